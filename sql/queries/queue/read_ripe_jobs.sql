-- Reads which scheduled jobs are due, in the order in which promote_due_jobs takes them.
-- No row means that none is due.
SELECT waiting.id
FROM training_jobs AS waiting
WHERE waiting.run_after IS NOT NULL
  AND NOT waiting.due
  AND NOT waiting.held
  AND waiting.run_after <= clock_timestamp()
  AND waiting.id <> ALL (%(skip)s::uuid[])
ORDER BY waiting.run_after
LIMIT 100
