-- Requeues a job because its host cannot work at all; the attempt does not count. Immediately the first time, because
-- another host may be free, then with a growing delay. After `most` returns since the submission, attempts count again.
-- Always one row, which _ending_answer.sql explains.
WITH ended AS (
    -- include: end_lease
    RETURNING lease.job_id, lease.epoch, lease.worker_id
),
before AS (
    SELECT count(*) AS returns
    FROM training_events AS event
    WHERE event.job_id = %(job_id)s
      AND event.kind = 'returned'
      AND event.id > coalesce((
          SELECT max(again.id)
          FROM training_events AS again
          WHERE again.job_id = %(job_id)s
            AND again.kind = 'resubmitted'
      ), 0)
),
decided AS (
    SELECT before.returns < %(most)s::bigint AS uncounted,
           before.returns < %(most)s::bigint OR job.attempt < job.max_attempts AS again,
           CASE WHEN before.returns > 0 THEN least(300, 5 * 2 ^ (before.returns - 1)) ELSE 0 END AS delay_seconds
    FROM before
    CROSS JOIN training_jobs AS job
    WHERE job.id = %(job_id)s
),
moved AS (
    UPDATE training_jobs AS job
    SET status = CASE WHEN decided.again THEN 'queued' ELSE 'failed' END,
        current_stage = CASE WHEN decided.again THEN 'queued' ELSE job.current_stage END,
        attempt = CASE WHEN decided.uncounted THEN greatest(job.attempt - 1, 0) ELSE job.attempt END,
        run_after = CASE
            WHEN decided.again AND decided.delay_seconds > 0
            THEN clock_timestamp() + decided.delay_seconds * interval '1 second'
        END,
        completed_at = CASE WHEN decided.again THEN NULL ELSE clock_timestamp() END,
        estimated_completion_at = NULL,
        current_cost = coalesce(%(cost)s::numeric, job.current_cost),
        final_cost = CASE WHEN decided.again THEN NULL ELSE coalesce(%(cost)s::numeric, job.current_cost) END,
        error_code = CASE WHEN decided.uncounted THEN NULL ELSE %(error_code)s END,
        error_message = CASE WHEN decided.uncounted THEN NULL ELSE %(error_message)s END,
        error_hint = CASE WHEN decided.uncounted THEN NULL ELSE %(error_hint)s END,
        error_stack = CASE WHEN decided.uncounted THEN NULL ELSE %(error_stack)s END
    FROM ended
    CROSS JOIN decided
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('initializing', 'running')
    RETURNING job.id, job.lease_epoch, job.status, ended.worker_id, decided.uncounted
),
told AS (
    -- This event comes before that of the move, because triggers write at the statement's end.
    INSERT INTO training_events (job_id, epoch, kind, message, data)
    SELECT moved.id, moved.lease_epoch, 'returned', %(error_message)s,
           jsonb_build_object(
               'part', %(part)s::text, 'error_code', %(error_code)s::text,
               'worker_id', moved.worker_id, 'counted', NOT moved.uncounted
           )
    FROM moved
)
-- include: ending_answer
