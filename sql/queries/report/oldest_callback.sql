-- Reads how long the oldest unsent callback has waited, in seconds. Always one row; null means that none waits.
SELECT extract(epoch FROM clock_timestamp() - min(callback.created_at))::float8 AS seconds
FROM training_callbacks AS callback
WHERE callback.state = 'pending'
