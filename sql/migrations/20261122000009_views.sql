-- Reading it in SQL: each view shows a user his own rows and the service role all of them (security_invoker).

SET LOCAL lock_timeout = '1s';

-- A job as its user wants to see it. `state` says `lost` from the moment that a lease has expired, reaped or not.
CREATE OR REPLACE VIEW public.training_job_status WITH (security_invoker = true) AS
SELECT
    job.id AS job_id,
    job.user_id,
    CASE
        WHEN job.status IN ('initializing', 'running') AND job.lease_epoch > 0
             AND (lease.expires_at IS NULL OR lease.expires_at < clock_timestamp())
        THEN 'lost'
        ELSE job.status
    END AS state,
    job.current_stage AS stage,
    job.progress,
    job.current_epoch,
    job.current_step,
    job.total_steps,
    job.current_metrics AS metrics,
    job.attempt,
    job.max_attempts,
    job.queued_at,
    job.started_at,
    job.completed_at,
    job.estimated_completion_at,
    job.last_progress_at,
    lease.expires_at AS lease_expires_at,
    coalesce(job.final_cost, job.current_cost) AS cost,
    job.error_code,
    job.error_message,
    job.error_hint,
    job.adapter_path,
    -- The answer of the older HTTP contract.
    public.training_status_json(job) AS contract
FROM public.training_jobs AS job
LEFT JOIN (SELECT held.job_id, held.expires_at FROM public.training_leases AS held) AS lease ON lease.job_id = job.id;

-- Workers that would take a job now: alive and not draining. A worker touches its row several times a minute.
CREATE OR REPLACE VIEW public.training_live_workers WITH (security_invoker = true) AS
SELECT
    worker.id, worker.device, worker.gpu_count, worker.gpu_memory_gb, worker.gpu_type, worker.models, worker.slots,
    worker.user_cap, worker.busy, worker.state
FROM public.training_workers AS worker
WHERE worker.state IN ('idle', 'busy')
  AND worker.last_seen_at > clock_timestamp() - interval '2 minutes';

-- What waits, in claiming order, and why. A job that nobody can serve says so.
CREATE OR REPLACE VIEW public.training_queue WITH (security_invoker = true) AS
SELECT
    numbered.place,
    job.id AS job_id,
    job.user_id,
    job.priority,
    job.queued_at,
    job.run_after,
    job.attempt,
    job.base_model,
    job.need_gpus,
    job.need_gpu_memory_gb,
    job.need_gpu_type,
    CASE
        WHEN job.held THEN 'held: queued before the trainer was installed'
        WHEN NOT job.due AND job.run_after > clock_timestamp() THEN
            CASE WHEN job.attempt > 0 THEN 'retry scheduled' ELSE 'scheduled' END
        WHEN leased.here THEN 'its last run is still ending'
        WHEN workers.alive = 0 THEN 'no worker'
        WHEN workers.enough_gpus = 0 THEN format('no worker has %s GPUs', job.need_gpus)
        WHEN workers.enough_memory = 0 THEN format('GPU too small: %s GB asked for', job.need_gpu_memory_gb)
        WHEN workers.right_type = 0 THEN format('no worker has a GPU of the type %s', job.need_gpu_type)
        WHEN workers.right_model = 0 THEN format('no worker serves %s', job.base_model)
        WHEN workers.user_cap <= running.jobs THEN 'cap reached'
        WHEN workers.idle_slots = 0 THEN 'all workers busy'
        ELSE 'next'
    END AS waiting_reason
FROM public.training_jobs AS job
-- Only who asks for the place has the whole queue numbered: GROUP BY tells the planner that at most one row joins, and
-- an outer join that adds neither row nor column is left out. So why one job waits is a matter of its own row.
LEFT JOIN (
    SELECT line.id, min(line.place) AS place
    FROM (
        SELECT
            waiting.id,
            row_number() OVER (ORDER BY waiting.due DESC, waiting.priority DESC, waiting.queued_at, waiting.id) AS place
        FROM public.training_jobs AS waiting
        WHERE waiting.status = 'queued'
    ) AS line
    GROUP BY line.id
) AS numbered ON numbered.id = job.id
CROSS JOIN LATERAL (
    SELECT
        count(*) AS alive,
        count(*) FILTER (WHERE fits.gpus) AS enough_gpus,
        count(*) FILTER (WHERE fits.gpus AND fits.memory) AS enough_memory,
        count(*) FILTER (WHERE fits.gpus AND fits.memory AND fits.kind) AS right_type,
        count(*) FILTER (WHERE fits.gpus AND fits.memory AND fits.kind AND fits.model) AS right_model,
        max(coalesce(worker.user_cap, 2147483647))
            FILTER (WHERE fits.gpus AND fits.memory AND fits.kind AND fits.model) AS user_cap,
        coalesce(sum(greatest(worker.slots - worker.busy, 0))
            FILTER (WHERE fits.gpus AND fits.memory AND fits.kind AND fits.model), 0) AS idle_slots
    FROM public.training_live_workers AS worker
    CROSS JOIN LATERAL (
        SELECT
            -- A CPU host takes what its settings tell it to take.
            worker.device = 'cpu' OR worker.gpu_count >= job.need_gpus AS gpus,
            worker.gpu_memory_gb IS NULL OR job.need_gpu_memory_gb IS NULL
                OR job.need_gpu_memory_gb * 0.95 <= worker.gpu_memory_gb AS memory,
            worker.gpu_type IS NULL OR job.need_gpu_type IS NULL
                OR strpos(lower(worker.gpu_type), lower(job.need_gpu_type)) > 0 AS kind,
            worker.models IS NULL OR job.base_model IS NULL OR job.base_model = ANY (worker.models) AS model
    ) AS fits
) AS workers
CROSS JOIN LATERAL (
    SELECT count(*) AS jobs FROM public.training_leases AS lease WHERE lease.user_id = job.user_id
) AS running
CROSS JOIN LATERAL (
    SELECT EXISTS (SELECT FROM public.training_leases AS lease WHERE lease.job_id = job.id) AS here
) AS leased
WHERE job.status = 'queued';

-- The hosts, for the operator: which are alive, what each holds, what its hardware does.
CREATE OR REPLACE VIEW public.training_worker_status WITH (security_invoker = true) AS
SELECT
    worker.id AS worker_id,
    worker.host,
    worker.pod,
    CASE
        WHEN worker.state <> 'gone' AND worker.last_seen_at < clock_timestamp() - interval '2 minutes' THEN 'lost'
        WHEN worker.drain AND worker.state <> 'gone' THEN 'draining'
        ELSE worker.state
    END AS state,
    worker.device,
    worker.gpu_count,
    worker.gpu_type,
    worker.gpu_memory_gb,
    worker.slots,
    worker.busy,
    held.jobs,
    worker.started_at,
    worker.last_seen_at,
    worker.data,
    worker.versions
FROM public.training_workers AS worker
CROSS JOIN LATERAL (
    SELECT coalesce(array_agg(lease.job_id ORDER BY lease.claimed_at), '{}') AS jobs
    FROM public.training_leases AS lease
    WHERE lease.worker_id = worker.id
) AS held;

-- Day by day: how many ended and how, how long they waited and ran, what they cost.
CREATE OR REPLACE VIEW public.training_throughput WITH (security_invoker = true) AS
SELECT
    date_trunc('day', job.completed_at) AS day,
    count(*) FILTER (WHERE job.status = 'completed') AS completed,
    count(*) FILTER (WHERE job.status = 'failed') AS failed,
    count(*) FILTER (WHERE job.status = 'cancelled') AS cancelled,
    round(avg(extract(epoch FROM job.started_at - job.queued_at)) FILTER (WHERE job.status = 'completed'), 1)
        AS mean_wait_seconds,
    round(avg(extract(epoch FROM job.completed_at - job.started_at)) FILTER (WHERE job.status = 'completed'), 1)
        AS mean_run_seconds,
    sum(job.final_cost) AS cost
FROM public.training_jobs AS job
WHERE job.completed_at IS NOT NULL
GROUP BY 1;

-- Rows that say running though no daemon holds them: an older dispatcher's, or something to look at. Never touched by us.
CREATE OR REPLACE VIEW public.training_orphans WITH (security_invoker = true) AS
SELECT
    job.id AS job_id,
    job.user_id,
    job.status,
    job.external_job_id,
    job.started_at,
    job.updated_at,
    CASE WHEN job.lease_epoch = 0 THEN 'not ours: an older dispatcher runs it or has lost it' ELSE 'no lease' END AS reason
FROM public.training_jobs AS job
WHERE job.status IN ('initializing', 'running')
  AND NOT EXISTS (SELECT FROM public.training_leases AS lease WHERE lease.job_id = job.id);

REVOKE ALL ON
    public.training_job_status, public.training_queue, public.training_throughput, public.training_orphans,
    public.training_live_workers, public.training_worker_status
FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT ON
    public.training_job_status, public.training_queue, public.training_throughput, public.training_orphans,
    public.training_live_workers
TO authenticated, service_role, training_daemon;
GRANT SELECT ON public.training_worker_status TO service_role, training_daemon;
