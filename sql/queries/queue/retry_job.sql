-- Records a transient failure: the job is requeued with a delay, or failed if no attempts are left.
-- Always one row, which _ending_answer.sql explains.
WITH ended AS (
    -- include: end_lease
    RETURNING lease.job_id, lease.epoch
),
moved AS (
    UPDATE training_jobs AS job
    SET status = CASE WHEN job.attempt < job.max_attempts THEN 'queued' ELSE 'failed' END,
        current_stage = CASE WHEN job.attempt < job.max_attempts THEN 'queued' ELSE job.current_stage END,
        run_after = CASE
            WHEN job.attempt < job.max_attempts
            THEN clock_timestamp() + %(delay_seconds)s::float8 * interval '1 second'
        END,
        completed_at = CASE WHEN job.attempt < job.max_attempts THEN NULL ELSE clock_timestamp() END,
        estimated_completion_at = NULL,
        current_cost = coalesce(%(cost)s::numeric, job.current_cost),
        final_cost = CASE
            WHEN job.attempt < job.max_attempts THEN NULL
            ELSE coalesce(%(cost)s::numeric, job.current_cost)
        END,
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
