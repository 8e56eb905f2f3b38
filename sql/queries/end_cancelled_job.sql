-- A cancelled job's child is gone: its lease ends, its final cost and what was saved are recorded.
-- Always one row. `ended` = 0: the lease is lost. No state: the job is not cancelled (it was submitted again).
-- `noted`: something of the job may lie in Storage.
WITH ended AS (
    DELETE FROM training_leases AS lease
    WHERE lease.job_id = %(job_id)s
      AND lease.epoch = %(epoch)s
    RETURNING lease.job_id, lease.epoch
),
settled AS (
    UPDATE training_jobs AS job
    SET current_cost = greatest(job.current_cost, %(cost)s::numeric),
        final_cost = greatest(job.final_cost, %(cost)s::numeric)
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status = 'cancelled'
    RETURNING job.status
),
told AS (
    INSERT INTO training_events (job_id, epoch, kind, message, data)
    SELECT ended.job_id, ended.epoch, 'stopped', 'the trainer of the cancelled job has ended', %(data)s
    FROM ended
)
SELECT
    (SELECT count(*) FROM ended) AS ended,
    (SELECT settled.status FROM settled) AS state,
    EXISTS (SELECT FROM training_uploads AS upload WHERE upload.job_id = %(job_id)s) AS noted
