-- Locks out other fleet loops for one look; the lock ends with its connection at the latest.
-- Always one row: whether we got the lock, and the time.
SELECT pg_try_advisory_lock(hashtext('brightrun-trainer fleet')) AS ours, clock_timestamp() AS now
