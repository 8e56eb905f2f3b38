-- Records the final cost of a job that was cancelled while its attempt ended; its lease has ended as well.
-- No row means that the job is not cancelled under our epoch.
UPDATE training_jobs AS job
SET current_cost = greatest(job.current_cost, %(cost)s::numeric),
    final_cost = greatest(job.final_cost, %(cost)s::numeric)
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
  AND job.status = 'cancelled'
RETURNING job.status AS state
