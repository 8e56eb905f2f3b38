"""How text, numbers and curves look on a terminal. Knows nothing of jobs; the command line and the demo call it."""
