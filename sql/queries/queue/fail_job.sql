-- The attempt ended for good: another one would end the same way. The lease ends.
-- Always one row. `ended` = 0: the lease is lost. `ended` = 1 and no state: the job was cancelled meanwhile.
-- `noted`: something of the job may lie in Storage.
WITH ended AS (
    DELETE FROM training_leases AS lease
    WHERE lease.job_id = %(job_id)s
      AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
    RETURNING lease.job_id, lease.epoch
),
moved AS (
    UPDATE training_jobs AS job
    SET status = 'failed',
        completed_at = clock_timestamp(),
        estimated_completion_at = NULL,
        current_cost = coalesce(%(cost)s::numeric, job.current_cost),
        final_cost = coalesce(%(cost)s::numeric, job.current_cost),
        error_code = %(error_code)s,
        error_message = %(error_message)s,
        error_hint = %(error_hint)s,
        error_stack = %(error_stack)s
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('initializing', 'running')
    RETURNING job.status
)
SELECT
    (SELECT count(*) FROM ended) AS ended,
    (SELECT moved.status FROM moved) AS state,
    EXISTS (SELECT FROM training_uploads AS upload WHERE upload.job_id = %(job_id)s) AS noted
