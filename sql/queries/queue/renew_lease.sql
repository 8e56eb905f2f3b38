-- Extends the lease. An expired lease that has not been reaped can still be renewed.
-- No row means that the lease is lost. The job's state shows whether it was cancelled.
UPDATE training_leases AS lease
SET heartbeat_at = clock_timestamp(),
    expires_at = clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second'
WHERE lease.job_id = %(job_id)s
  AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
RETURNING (SELECT job.status FROM training_jobs AS job WHERE job.id = lease.job_id) AS state
