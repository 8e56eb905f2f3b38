-- The daemon is alive: its lease lasts from now. One that expired but was not reaped is renewed as well.
-- No row means that the lease is lost. The job's state tells of a cancel.
UPDATE training_leases AS lease
SET heartbeat_at = clock_timestamp(),
    expires_at = clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second'
WHERE lease.job_id = %(job_id)s
  AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
RETURNING (SELECT job.status FROM training_jobs AS job WHERE job.id = lease.job_id) AS state
