"""Loads exactly the base model of the spec, quantised while it loads, on one device or sharded over several."""
