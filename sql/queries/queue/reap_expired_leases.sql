-- Expires the leases of silent hosts. Their jobs are requeued, or failed if no attempts are left.
-- One row per lease; none means that none had expired. `state` initializing or running: the
-- database refused to move this job, and it is unchanged.
SELECT reaped.job_id, reaped.state
FROM reap_expired_leases() AS reaped
