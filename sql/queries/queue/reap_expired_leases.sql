-- Hosts that fell silent lose their leases; their jobs go back to the queue, or to failed without an attempt left.
-- One row a lease; none means that none had expired. `state` initializing or running: the
-- database would not move this job, and it is as it was.
SELECT reaped.job_id, reaped.state
FROM reap_expired_leases() AS reaped
