-- Reads how long the oldest unsent callback has waited, in seconds. No row means that none waits.
SELECT extract(epoch FROM clock_timestamp() - callback.created_at)::float8 AS seconds
FROM training_callbacks AS callback
WHERE callback.state = 'pending'
ORDER BY callback.created_at
LIMIT 1
