-- Records that a daemon is alive, what it does and its hardware's load. Returns whether the operator wants it drained.
-- No row means that it was never registered.
UPDATE training_workers AS worker
SET state = %(state)s,
    busy = %(busy)s,
    data = %(data)s,
    last_seen_at = clock_timestamp()
WHERE worker.id = %(id)s
RETURNING worker.drain
