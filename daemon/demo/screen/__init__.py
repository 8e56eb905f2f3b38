"""What `make demo` shows: a live view on a terminal, JSON lines for programs. Called by the demo."""
