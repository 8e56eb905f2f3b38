"""Comparisons of adapters: recorded whole, then voted on."""
