-- Records a permanent failure: another attempt would fail the same way. Ends the lease.
-- Always one row, which _ending_answer.sql explains.
WITH ended AS (
    -- include: end_lease
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
-- include: ending_answer
