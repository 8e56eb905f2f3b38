"""`make demo` and `make playground`: a Postgres, a daemon and a real small model on this machine. Nothing is left
running afterwards. Called by `daemon.__main__` only."""
