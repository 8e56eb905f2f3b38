-- Releases the fleet's lock after a look, so that another loop can have the next one. Always one row.
SELECT pg_advisory_unlock(hashtext('brightrun-trainer fleet')) AS was_ours
