-- Makes scheduled jobs and retries claimable when their time has come.
-- One row per job; none means that nothing is due, or that another daemon is promoting it now.
UPDATE training_jobs AS job
SET due = true
FROM (
    SELECT waiting.id
    FROM training_jobs AS waiting
    WHERE waiting.run_after IS NOT NULL
      AND NOT waiting.due
      AND NOT waiting.held
      AND waiting.run_after <= clock_timestamp()
      AND waiting.id <> ALL (%(skip)s::uuid[])
      AND (%(only)s::uuid IS NULL OR waiting.id = %(only)s::uuid)
    ORDER BY waiting.run_after
    LIMIT 100
    FOR NO KEY UPDATE SKIP LOCKED
) AS ripe
WHERE job.id = ripe.id
  AND job.status = 'queued'
RETURNING job.id
