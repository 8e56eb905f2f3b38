-- Reads what the service's metrics show: due jobs, leases, workers, the outbox, and the events since the last call.
-- It scans no history. Always one row. `cursor` is the after_id of the next call; without after_id, events begin now.
WITH due AS MATERIALIZED (
    -- Beyond this limit the exact number does not matter.
    SELECT job.queued_at
    FROM training_jobs AS job
    WHERE job.due
    LIMIT 100000
),
held AS MATERIALIZED (
    SELECT lease.heartbeat_at, lease.expires_at, job.status, job.current_metrics -> 'throughput' AS throughput
    FROM training_leases AS lease
    JOIN training_jobs AS job ON job.id = lease.job_id
),
news AS MATERIALIZED (
    -- Two seconds behind: ids are assigned before their transactions commit, so a higher id may be visible first.
    SELECT event.id, event.job_id, event.kind, event.at, event.data
    FROM training_events AS event
    WHERE event.id > coalesce(%(after_id)s::bigint, (SELECT max(last.id) FROM training_events AS last), 0)
      AND event.at < clock_timestamp() - interval '2 seconds'
    ORDER BY event.id
    LIMIT 20000
),
pickups AS (
    -- From when the job could be claimed, according to the last event that queued it, to its claim.
    SELECT extract(epoch FROM news.at - greatest(queued.at, (queued.data ->> 'run_after')::timestamptz))::float8 AS seconds
    FROM news
    CROSS JOIN LATERAL (
        SELECT event.at, event.data
        FROM training_events AS event
        WHERE event.job_id = news.job_id
          AND event.id < news.id
          AND event.data ->> 'to' = 'queued'
        ORDER BY event.id DESC
        LIMIT 1
    ) AS queued
    WHERE news.kind = 'claimed'
),
endings AS (
    SELECT news.kind, coalesce(news.data ->> 'error_code', '') AS code, count(*) AS jobs
    FROM news
    WHERE news.kind IN ('completed', 'failed', 'cancelled', 'retrying', 'reaped', 'released')
    GROUP BY 1, 2
),
workers AS (
    SELECT worker.state, count(*) AS hosts, sum(jsonb_array_length(coalesce(worker.data -> 'troubles', '[]'))) AS troubles
    FROM training_workers AS worker
    WHERE worker.state IN ('idle', 'busy', 'out_of_service')
      AND worker.last_seen_at > clock_timestamp() - interval '2 minutes'
    GROUP BY 1
)
SELECT
    (SELECT count(*) FROM due) AS due,
    (SELECT extract(epoch FROM clock_timestamp() - min(due.queued_at))::float8 FROM due) AS oldest_wait_seconds,
    (SELECT count(*) FROM training_jobs AS job WHERE job.run_after IS NOT NULL AND NOT job.due) AS scheduled,
    (SELECT count(*) FROM held WHERE held.status = 'initializing') AS initializing,
    (SELECT count(*) FROM held WHERE held.status = 'running') AS running,
    (SELECT count(*) FROM held WHERE held.expires_at < clock_timestamp()) AS lost,
    (SELECT extract(epoch FROM clock_timestamp() - min(held.heartbeat_at))::float8 FROM held) AS heartbeat_age_seconds,
    (SELECT coalesce(sum(held.throughput::numeric), 0)::float8
     FROM held WHERE held.status = 'running' AND jsonb_typeof(held.throughput) = 'number') AS tokens_per_second,
    (SELECT count(*) FROM training_callbacks AS callback WHERE callback.state = 'pending') AS outbox,
    (SELECT extract(epoch FROM clock_timestamp() - min(callback.created_at))::float8
     FROM training_callbacks AS callback WHERE callback.state = 'pending') AS outbox_age_seconds,
    (SELECT coalesce(jsonb_object_agg(workers.state, workers.hosts), '{}') FROM workers) AS workers,
    (SELECT coalesce(sum(workers.troubles), 0)::int FROM workers) AS troubles,
    (SELECT coalesce(jsonb_agg(pickups.seconds), '[]') FROM pickups) AS pickups,
    (SELECT coalesce(jsonb_agg(to_jsonb(endings)), '[]') FROM endings) AS endings,
    coalesce(
        (SELECT max(news.id) FROM news), %(after_id)s::bigint, (SELECT max(last.id) FROM training_events AS last), 0
    ) AS cursor
