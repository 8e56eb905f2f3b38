-- Marks a callback as dead after the receiver has been gone or has refused for days. resend_callback() sends it again.
-- No row means that the lock expired and another process has the callback now.
UPDATE training_callbacks AS callback
SET state = 'dead',
    last_status = %(status)s,
    last_error = %(error)s,
    locked_until = NULL,
    lock_token = NULL
WHERE callback.id = %(id)s
  AND callback.lock_token = %(token)s
  AND callback.state = 'pending'
RETURNING callback.id
