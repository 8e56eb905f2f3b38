"""Starts pods when jobs wait and ends those that nobody needs. The rules are plain functions of what was seen;
`brightrun-trainer fleet` runs the loop."""
