"""The trainer: a child process that turns one spec into one adapter and reports events."""
