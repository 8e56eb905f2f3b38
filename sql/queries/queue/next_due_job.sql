-- Reads when a sleeping daemon must wake for a scheduled job: seconds from now (negative when late).
-- No row means that nothing is scheduled.
SELECT extract(epoch FROM waiting.run_after - clock_timestamp())::float8 AS seconds
FROM training_jobs AS waiting
WHERE waiting.run_after IS NOT NULL
  AND NOT waiting.due
  AND NOT waiting.held
  AND waiting.id <> ALL (%(skip)s::uuid[])
ORDER BY waiting.run_after
LIMIT 1
