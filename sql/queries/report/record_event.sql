-- Records one event of a job, as long as we hold the lease, also while the trainer of a cancelled job is ending.
-- No row means that the lease is lost.
INSERT INTO training_events (job_id, epoch, kind, message, data)
SELECT held.job_id, held.epoch, %(kind)s, %(message)s, %(data)s
FROM (
    SELECT lease.job_id, lease.epoch
    -- include: own_lease
) AS held
RETURNING id
