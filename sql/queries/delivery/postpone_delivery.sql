-- Gives a delivery back: for later, or for another host. `counted` false: nothing is wrong with the delivery, and the try
-- does not count. Without an error the last one stays. No row means that the lock is lost.
UPDATE training_deliveries AS delivery
SET state = 'waiting',
    attempts = delivery.attempts - (NOT %(counted)s)::int,
    next_at = clock_timestamp() + %(delay_seconds)s::float8 * interval '1 second',
    first_worker = NULL,
    error_code = coalesce(%(code)s::text, delivery.error_code),
    error_message = coalesce(%(message)s::text, delivery.error_message),
    error_hint = CASE WHEN %(message)s::text IS NULL THEN delivery.error_hint ELSE %(hint)s::text END,
    locked_until = NULL,
    lock_token = NULL
WHERE delivery.id = %(id)s
  AND delivery.lock_token = %(token)s
RETURNING delivery.id
