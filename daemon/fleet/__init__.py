"""Starts pods when jobs wait and ends pods that are not needed. The rules are plain functions of the observed state;
`brightrun-trainer fleet` runs the loop."""
