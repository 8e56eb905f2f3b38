"""The machine we run on: its GPUs, its slots and their current load. It only measures; the worker, the claim and the
heartbeat use it."""
