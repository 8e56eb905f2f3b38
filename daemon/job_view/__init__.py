"""Shows jobs while they run: reads their rows, curves and events, and draws them live, as lines or as JSON.

Called by the commands `watch`, `submit`, `events`, `jobs` and `show`, and by the demo. It writes no row.
"""
