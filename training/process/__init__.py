"""Runs the trainer as a process: from the spec on stdin to the exit code; and the fork server, which waits between
jobs with its libraries imported. A job leaves nothing in the fork server. Called by `training.__main__`."""
