"""One look of the fleet: what waits, which hosts and pods there are, and what was decided about them."""
