-- Ends a delivery that cannot be done. Its job stays completed. No row means that the lock is lost.
UPDATE training_deliveries AS delivery
SET state = 'failed',
    error_code = %(code)s,
    error_message = %(message)s,
    error_hint = %(hint)s,
    finished_at = clock_timestamp(),
    locked_until = NULL,
    lock_token = NULL
WHERE delivery.id = %(id)s
  AND delivery.lock_token = %(token)s
RETURNING delivery.id
