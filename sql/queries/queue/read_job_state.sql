-- Reads a job's state under our epoch: an ending whose answer was lost asks whether it had come through.
-- No row means that somebody else has claimed the job since, or that it was deleted.
SELECT job.status AS state
FROM training_jobs AS job
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
