"""How a watched job is followed and drawn."""
