"""The data of the commands: rows, users, the trainer's preflight. It reads with the user's own database rights. Called
by the commands."""
