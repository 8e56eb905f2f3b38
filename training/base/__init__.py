"""Loads exactly the base model that the spec names, quantised while loading, on one device or sharded over several.
Its files are never changed. Used by the recipe and the fork server."""
