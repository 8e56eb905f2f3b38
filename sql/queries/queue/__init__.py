"""The jobs table as a state machine: claim, lease, the moves that end an attempt, and what is read on the way."""
