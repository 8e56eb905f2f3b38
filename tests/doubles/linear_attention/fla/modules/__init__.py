"""Modules that are no operators of attention."""
