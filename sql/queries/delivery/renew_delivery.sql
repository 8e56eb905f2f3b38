-- Extends the lock of a delivery that this host works on. No row means that another host has it, or that it was redone.
UPDATE training_deliveries AS delivery
SET locked_until = clock_timestamp() + %(lock_seconds)s::float8 * interval '1 second',
    next_at = clock_timestamp() + %(lock_seconds)s::float8 * interval '1 second'
WHERE delivery.id = %(id)s
  AND delivery.lock_token = %(token)s
RETURNING delivery.id
