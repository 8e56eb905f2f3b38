-- Ends the lease of a cancelled job whose trainer has ended, and records its final cost and what was saved.
-- Always one row. `ended` = 0: the lease is lost. No state: the job was submitted again. State queued: it was not
-- cancelled under this lease (a late notice of an earlier cancel), so it is requeued instead of staying
-- "running" for ever without a lease that could expire.
-- `noted`: Storage may contain objects of the job.
WITH ended AS (
    -- include: end_lease
    RETURNING lease.job_id, lease.epoch
),
settled AS (
    UPDATE training_jobs AS job
    SET status = CASE job.status WHEN 'cancelled' THEN 'cancelled' ELSE 'queued' END,
        current_stage = CASE job.status WHEN 'cancelled' THEN job.current_stage ELSE 'queued' END,
        attempt = CASE job.status WHEN 'cancelled' THEN job.attempt ELSE greatest(job.attempt - 1, 0) END,
        current_cost = greatest(job.current_cost, %(cost)s::numeric),
        final_cost = CASE job.status WHEN 'cancelled' THEN greatest(job.final_cost, %(cost)s::numeric) END
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('cancelled', 'initializing', 'running')
    RETURNING job.status
),
told AS (
    INSERT INTO training_events (job_id, epoch, kind, message, data)
    SELECT ended.job_id, ended.epoch, 'stopped', 'The trainer of the cancelled job has ended.', %(data)s
    FROM ended
)
SELECT
    (SELECT count(*) FROM ended) AS ended,
    (SELECT settled.status FROM settled) AS state,
    EXISTS (SELECT FROM training_uploads AS upload WHERE upload.job_id = %(job_id)s) AS noted
