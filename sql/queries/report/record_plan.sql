-- Replaces the estimates that the row was inserted with by the run's real size.
-- No row means that the lease is lost or the job cancelled.
UPDATE training_jobs AS job
SET total_steps = %(total_steps)s,
    total_epochs = %(total_epochs)s,
    estimated_total_cost = coalesce(%(estimated_total_cost)s::numeric, job.estimated_total_cost),
    last_progress_at = clock_timestamp()
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
  AND job.status IN ('initializing', 'running')
RETURNING job.id
