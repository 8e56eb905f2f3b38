"""Reads watched jobs and draws them."""
