"""What the commands read and write: rows, users, the trainer's preflight."""
