-- Moves a job from initializing to running after its first optimizer step. Repeating it (a lost answer) is harmless.
-- No row means that the lease is lost or the job cancelled.
UPDATE training_jobs AS job
SET status = 'running',
    current_stage = 'training',
    last_progress_at = clock_timestamp()
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
  AND job.status IN ('initializing', 'running')
RETURNING job.id
