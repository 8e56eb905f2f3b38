-- Given up: the receiver is gone or has refused for days. SQL can see it (state 'dead') and resend_callback() it.
-- No row means that the lock ran out and somebody else has it now.
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
