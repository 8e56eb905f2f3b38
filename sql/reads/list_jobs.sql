-- Lists jobs, one row each: those with the given ids, else those that match; unfinished ones first, then the newest.
-- Ages and times left are seconds by the database's clock. No row means that none matches.
SELECT
    status.job_id,
    status.user_id,
    status.state,
    status.stage,
    coalesce(status.progress, 0)::float8 AS progress,
    coalesce(status.current_epoch, 0) AS epoch,
    job.total_epochs,
    coalesce(status.current_step, 0) AS step,
    status.total_steps,
    coalesce(status.metrics, '{}') AS metrics,
    job.base_model AS model,
    status.attempt,
    status.max_attempts,
    job.priority,
    status.queued_at,
    status.started_at,
    status.completed_at,
    status.last_progress_at,
    extract(epoch FROM clock_timestamp() - status.queued_at)::float8 AS age_seconds,
    extract(epoch FROM coalesce(status.completed_at, clock_timestamp()) - status.started_at)::float8 AS run_seconds,
    extract(epoch FROM status.estimated_completion_at - clock_timestamp())::float8 AS seconds_left,
    status.cost::float8 AS cost,
    status.error_code,
    status.error_message,
    status.error_hint,
    status.adapter_path,
    coalesce(status.contract -> 'deliveries', '[]') AS deliveries
FROM public.training_job_status AS status
JOIN public.training_jobs AS job ON job.id = status.job_id
WHERE (%(ids)s::uuid[] IS NULL OR job.id = ANY (%(ids)s::uuid[]))
  AND (%(states)s::text[] IS NULL OR status.state = ANY (%(states)s::text[]))
  AND (%(user_id)s::uuid IS NULL OR job.user_id = %(user_id)s::uuid)
  AND (%(model)s::text IS NULL OR strpos(lower(job.base_model), lower(%(model)s::text)) > 0)
ORDER BY job.status IN ('queued', 'initializing', 'running') DESC, job.queued_at DESC, job.id
LIMIT %(limit)s
