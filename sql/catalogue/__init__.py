"""Reads what a database has, so that it can be compared with what the migrations make."""
