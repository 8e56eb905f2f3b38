"""How text, numbers and curves look on a terminal. It knows nothing about jobs. The CLI and the demo use it."""
