-- Hosts that fell silent lose their leases; their jobs go back to the queue, or to failed without an attempt left.
-- One row a lease; none means that none had expired.
SELECT reaped.job_id, reaped.state
FROM reap_expired_leases() AS reaped
