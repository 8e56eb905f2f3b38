-- An ending found its job cancelled meanwhile, its lease has ended with it: the true final cost is recorded.
-- No row means that the job is not cancelled under our epoch.
UPDATE training_jobs AS job
SET current_cost = greatest(job.current_cost, %(cost)s::numeric),
    final_cost = greatest(job.final_cost, %(cost)s::numeric)
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
  AND job.status = 'cancelled'
RETURNING job.status AS state
