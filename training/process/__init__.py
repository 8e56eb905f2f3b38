"""How the trainer runs as a process: from the spec on stdin to the exit code, and the fork server that waits between
jobs with its libraries imported."""
