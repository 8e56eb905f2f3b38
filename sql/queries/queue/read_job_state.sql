-- Reads a job's state under our epoch, to check whether an outcome was written when the answer was lost.
-- No row means that another host has claimed the job since, or that it was deleted.
SELECT job.status AS state
FROM training_jobs AS job
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
