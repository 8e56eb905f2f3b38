"""Finds exactly the base model that a job names, in folders, caches or on the hub, and never another. If a folder lacks
a shard, the error names the shard. The attempt and the `models` commands call it."""
