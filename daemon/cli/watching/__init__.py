"""Follows watched jobs and draws them on a terminal. Called by `watch`, `submit` and `events`."""
