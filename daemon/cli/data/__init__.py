"""The data of the commands: rows, users, the trainer's preflight."""
