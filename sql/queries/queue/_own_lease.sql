-- Included by statements of several rooms that write about a job beside its row: no row where the lease is lost.
-- KEY SHARE: a reaper waits for us or we find its work done; a heartbeat is not disturbed.
FROM training_leases AS lease
WHERE lease.job_id = %(job_id)s
  AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
FOR KEY SHARE
