-- Lists the hosts, working ones first; `gone` and lost ones only of the last day, unless all are wanted.
SELECT
    worker.worker_id,
    worker.host,
    worker.pod,
    worker.state,
    worker.device,
    worker.gpu_count,
    worker.gpu_type,
    worker.gpu_memory_gb,
    worker.slots,
    worker.busy,
    worker.jobs,
    worker.started_at,
    worker.last_seen_at,
    extract(epoch FROM clock_timestamp() - worker.started_at)::float8 AS up_seconds,
    extract(epoch FROM clock_timestamp() - worker.last_seen_at)::float8 AS silent_seconds,
    worker.versions,
    coalesce(worker.data -> 'troubles', '[]') AS troubles
FROM public.training_worker_status AS worker
WHERE %(all)s
   OR (worker.state <> 'gone' AND worker.last_seen_at > clock_timestamp() - interval '1 day')
ORDER BY worker.state IN ('gone', 'lost'), worker.host, worker.started_at DESC
