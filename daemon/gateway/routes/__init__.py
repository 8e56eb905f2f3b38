"""The routes of the HTTP API, by who calls them, and the errors that all of them answer with."""
