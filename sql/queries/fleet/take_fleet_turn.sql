-- One fleet loop at a time, for the length of one look; the lock ends with its connection at the latest.
-- Always one row: whether the turn is ours, and the time.
SELECT pg_try_advisory_lock(hashtext('brightrun-trainer fleet')) AS ours, clock_timestamp() AS now
