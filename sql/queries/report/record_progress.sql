-- Records an attempt's progress: stage, progress (never backwards), step, metrics, cost and the time left.
-- `sequence` numbers the progress callback that follows.
-- No row means that the lease is lost or the job cancelled.
UPDATE training_jobs AS job
SET current_stage = %(stage)s,
    progress = greatest(job.progress, %(progress)s::numeric),
    current_epoch = %(current_epoch)s,
    current_step = %(current_step)s,
    current_metrics = %(metrics)s,
    current_cost = coalesce(%(current_cost)s::numeric, job.current_cost),
    estimated_completion_at = clock_timestamp() + %(seconds_left)s::float8 * interval '1 second',
    last_progress_at = clock_timestamp()
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
  AND job.status IN ('initializing', 'running')
RETURNING
    job.id,
    -- Its position among the job's callbacks; only if the job has a callback URL.
    CASE WHEN job.callback_url IS NOT NULL THEN nextval('training_callbacks_sequence_seq') END AS sequence
