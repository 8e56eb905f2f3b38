"""The routes of the HTTP API, grouped by their callers, and the errors of all routes. The gateway puts them
together."""
