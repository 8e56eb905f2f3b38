"""Runs the trainer as a process: from the spec on stdin to the exit code; and the fork server, which waits between
jobs with its libraries imported."""
