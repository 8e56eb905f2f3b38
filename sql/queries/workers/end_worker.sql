-- Records that a daemon has shut down cleanly. No row means that it was never registered.
UPDATE training_workers AS worker
SET state = 'gone',
    busy = 0,
    last_seen_at = clock_timestamp()
WHERE worker.id = %(id)s
RETURNING worker.id
