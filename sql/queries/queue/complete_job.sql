-- Completes the job, whose stored adapter was verified, and ends its lease. What follows (training_deliveries) is written
-- down in the same transaction.
-- Always one row, which _ending_answer.sql explains.
WITH ended AS (
    -- include: end_lease
    RETURNING lease.job_id, lease.epoch, lease.worker_id
),
moved AS (
    UPDATE training_jobs AS job
    SET status = 'completed',
        current_stage = 'completed',
        progress = 100,
        completed_at = clock_timestamp(),
        estimated_completion_at = NULL,
        last_progress_at = clock_timestamp(),
        current_cost = coalesce(%(cost)s::numeric, job.current_cost),
        final_cost = coalesce(%(cost)s::numeric, job.current_cost),
        adapter_path = %(adapter_path)s,
        adapter_sha256 = %(adapter_sha256)s,
        adapter_bytes = %(adapter_bytes)s,
        result = %(result)s
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('initializing', 'running')
    RETURNING
        job.status,
        training_make_deliveries(job.id, job.user_id, job.lease_epoch, ended.worker_id, %(deliveries)s::jsonb) AS deliveries
)
-- include: ending_answer
