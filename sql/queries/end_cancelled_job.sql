-- A cancelled job's child is gone: its lease ends, its final cost and what was saved are recorded.
-- Always one row. `ended` = 0: the lease is lost. No state: the job is not cancelled (it was submitted again).
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
),
freed AS (
    -- Submitted again while the old child was ending: until now no claim could take it.
    SELECT pg_notify('training_jobs', 'queued ' || job.id)
    FROM ended
    JOIN training_jobs AS job ON job.id = ended.job_id
    WHERE job.due
)
SELECT
    (SELECT count(*) FROM ended) AS ended,
    (SELECT settled.status FROM settled) AS state,
    (SELECT count(*) FROM freed) AS freed
