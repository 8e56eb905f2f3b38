-- Requeues a job that its host gives back (shutdown, preemption), immediately and without counting the attempt.
-- Always one row, which _ending_answer.sql explains.
WITH ended AS (
    -- include: end_lease
    RETURNING lease.job_id, lease.epoch
),
moved AS (
    UPDATE training_jobs AS job
    SET status = 'queued',
        current_stage = 'queued',
        attempt = greatest(job.attempt - 1, 0),
        run_after = NULL,
        estimated_completion_at = NULL,
        current_cost = coalesce(%(cost)s::numeric, job.current_cost)
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('initializing', 'running')
    RETURNING job.id, job.lease_epoch, job.status
),
told AS (
    -- This event comes before that of the move, because triggers write at the statement's end.
    INSERT INTO training_events (job_id, epoch, kind, message)
    SELECT moved.id, moved.lease_epoch, 'notice', %(reason)s
    FROM moved
)
-- include: ending_answer
