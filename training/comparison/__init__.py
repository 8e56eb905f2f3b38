"""Answers the same prompts with a base model and with adapters on it, and measures each on held-out conversations.

A process of its own: `python -m training.comparison`, a request on stdin, JSON lines on stdout. Started by the command
`brightrun-trainer compare`."""
