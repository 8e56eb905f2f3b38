-- Included by statements of several rooms that write about a job outside its row: no row if the lease is lost.
-- KEY SHARE: a reaper waits for us, or has finished before us; heartbeats are not blocked.
FROM training_leases AS lease
WHERE lease.job_id = %(job_id)s
  AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
FOR KEY SHARE
