"""What `make demo` shows: a live picture on a terminal, JSON lines elsewhere."""
