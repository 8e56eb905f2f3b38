-- Postpones a callback that the receiver did not accept. No row means that the lock expired and another process has it.
UPDATE training_callbacks AS callback
SET next_at = clock_timestamp() + %(delay_seconds)s::float8 * interval '1 second',
    last_status = %(status)s,
    last_error = %(error)s,
    locked_until = NULL,
    lock_token = NULL
WHERE callback.id = %(id)s
  AND callback.lock_token = %(token)s
  AND callback.state = 'pending'
RETURNING callback.id
