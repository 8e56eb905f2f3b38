-- The look is over; another loop may have the next one. Always one row.
SELECT pg_advisory_unlock(hashtext('brightrun-trainer fleet')) AS was_ours
