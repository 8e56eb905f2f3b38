-- Moves a job from initializing to running after its first optimizer step. Repeating it (a lost answer) is harmless.
-- From now on later attempts keep to the base model: see the guard (20261128000002).
-- No row means that the lease is lost or the job cancelled.
UPDATE training_jobs AS job
SET status = 'running',
    current_stage = 'training',
    trained_with = CASE
        WHEN job.trained_with -> 'first_step_at' IS NULL
        THEN job.trained_with || jsonb_build_object('first_step_at', clock_timestamp())
        ELSE job.trained_with
    END,
    last_progress_at = clock_timestamp()
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
  AND job.status IN ('initializing', 'running')
RETURNING job.id
