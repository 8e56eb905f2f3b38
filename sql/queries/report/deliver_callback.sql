-- Marks a callback as delivered. No row means that the lock expired and another process has the callback now.
UPDATE training_callbacks AS callback
SET state = 'delivered',
    delivered_at = clock_timestamp(),
    last_status = %(status)s,
    last_error = NULL,
    locked_until = NULL,
    lock_token = NULL
WHERE callback.id = %(id)s
  AND callback.lock_token = %(token)s
  AND callback.state = 'pending'
RETURNING callback.id
