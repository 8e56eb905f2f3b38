-- One line of the job's story. Told as long as the lease is ours, also while a cancelled job's child is ending.
-- No row means that the lease is lost.
INSERT INTO training_events (job_id, epoch, kind, message, data)
SELECT held.job_id, held.epoch, %(kind)s, %(message)s, %(data)s
FROM (
    SELECT lease.job_id, lease.epoch
    -- include: own_lease
) AS held
RETURNING id
