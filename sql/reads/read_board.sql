-- Reads the jobs of the dashboard in one snapshot: every job that a host holds or whose row says it is running, every
-- job with new events after a given id, and those with the given ids; with `whole` also the last jobs that ended,
-- with `day` those that ended within a day. It scans no history: leases are as few as running jobs, events are read
-- from their end, ended jobs by their index. The next read begins at `settled`: event ids are assigned before their
-- transactions commit, so the last five seconds are read again. Always one row.
WITH news AS MATERIALIZED (
    SELECT event.id, event.job_id, event.at, event.kind, event.message, event.data
    FROM public.training_events AS event
    WHERE event.id > coalesce(
        %(after)s::bigint,
        (SELECT old.id FROM public.training_events AS old
         WHERE old.at < clock_timestamp() - interval '5 seconds' ORDER BY old.id DESC LIMIT 1),
        0
    )
    ORDER BY event.id
    LIMIT %(most_news)s
),
ended AS MATERIALIZED (
    SELECT job.id
    FROM public.training_jobs AS job
    WHERE %(whole)s AND job.completed_at IS NOT NULL
    ORDER BY job.completed_at DESC
    LIMIT %(most_ended)s
),
wanted AS MATERIALIZED (
    SELECT lease.job_id FROM public.training_leases AS lease
    UNION
    SELECT job.id FROM public.training_jobs AS job WHERE job.status IN ('initializing', 'running')
    UNION
    SELECT news.job_id FROM news
    UNION
    SELECT ended.id FROM ended
    UNION
    SELECT unnest(%(ids)s::uuid[])
),
lines AS (
    SELECT line.*
    FROM wanted
    -- Row by row: the planner does not know how few rows there are, and would join the whole history. OFFSET forces it.
    CROSS JOIN LATERAL (
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
            left(job.base_model, 200) AS model,
            (SELECT left(dataset.name, 200) FROM public.datasets AS dataset WHERE dataset.id = job.dataset_id) AS dataset,
            (SELECT lease.worker_id FROM public.training_leases AS lease WHERE lease.job_id = job.id) AS worker_id,
            status.attempt,
            status.max_attempts,
            job.priority,
            status.queued_at,
            job.run_after,
            status.started_at,
            status.completed_at,
            status.estimated_completion_at,
            status.cost::float8 AS cost,
            status.error_code,
            left(status.error_message, 500) AS error_message,
            left(status.error_hint, 500) AS error_hint
        FROM public.training_job_status AS status
        JOIN public.training_jobs AS job ON job.id = status.job_id
        WHERE status.job_id = wanted.job_id AND job.id = wanted.job_id
        OFFSET 0
    ) AS line
)
SELECT
    (SELECT coalesce(jsonb_agg(to_jsonb(lines)), '[]') FROM lines) AS jobs,
    (SELECT coalesce(jsonb_agg(to_jsonb(news) ORDER BY news.id), '[]') FROM news) AS news,
    coalesce(
        (SELECT max(news.id) FROM news
         WHERE news.at < clock_timestamp() - interval '5 seconds'
            OR (SELECT count(*) FROM news) >= %(most_news)s),
        %(after)s::bigint,
        (SELECT min(news.id) - 1 FROM news),
        (SELECT max(last.id) FROM public.training_events AS last),
        0
    ) AS settled,
    CASE WHEN %(day)s THEN (
        SELECT jsonb_build_object(
            'completed', count(*) FILTER (WHERE job.status = 'completed'),
            'failed', count(*) FILTER (WHERE job.status = 'failed'),
            'cancelled', count(*) FILTER (WHERE job.status = 'cancelled'),
            'cost', coalesce(sum(job.final_cost), 0)::float8
        )
        FROM public.training_jobs AS job
        -- now(), because an index can be searched by it; clock_timestamp() would read every job that ever ended.
        WHERE job.completed_at > now() - interval '1 day'
    ) END AS day
