-- Reads which callbacks are due, the oldest first. No row means that none is.
SELECT callback.id
FROM training_callbacks AS callback
WHERE callback.state = 'pending'
  AND callback.next_at <= statement_timestamp()
  AND callback.id <> ALL (%(skip)s::uuid[])
ORDER BY callback.sequence
LIMIT 100
