-- Submits a job over HTTP whose row already exists. The row stays as it is, except that an unfinished job without a
-- callback URL gets the caller's. No row means that there is no such job.
WITH told AS (
    UPDATE training_jobs AS job
    SET callback_url = %(callback_url)s
    WHERE job.id = %(job_id)s
      AND job.callback_url IS NULL
      AND job.status IN ('queued', 'initializing', 'running')
      AND %(callback_url)s::text IS NOT NULL
    RETURNING job.id
)
SELECT
    job.id AS job_id,
    job.status AS state,
    -- An older dispatcher took this row before we were installed: we will never run it.
    job.status IN ('initializing', 'running') AND job.lease_epoch = 0 AS foreign_run,
    job.status = 'queued' AND job.held AS held,
    (SELECT count(*) FROM told) AS told
FROM training_jobs AS job
WHERE job.id = %(job_id)s
