"""Finds exactly the base model that a job names, in folders and caches or on the hub, and never another. A folder that
lacks a shard is refused by the shard's name. The attempt and the `models` commands call it."""
