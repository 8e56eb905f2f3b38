"""The machine we run on: its GPUs, its slots and what they do at the moment. It measures and decides nothing; the
worker, the claim and the heartbeat ask it."""
