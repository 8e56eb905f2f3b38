-- A host that cannot work (a volume that is gone or full, libraries that do not load, a lost GPU) says so in its row:
-- it claims nothing, counts as no living worker, and a job that waits for nobody else can say why.

SET LOCAL lock_timeout = '1s';

-- Known values only widen: no row has to be read.
ALTER TABLE public.training_workers DROP CONSTRAINT IF EXISTS training_workers_state_known;
ALTER TABLE public.training_workers ADD CONSTRAINT training_workers_state_known
    CHECK (state IN ('idle', 'busy', 'draining', 'out_of_service', 'gone')) NOT VALID;

-- What waits, in claiming order, and why: a queue whose every host is broken says so.
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
        WHEN job.held THEN 'held: ' || coalesce(
            (
                SELECT event.message
                FROM public.training_events AS event
                WHERE event.job_id = job.id AND event.kind = 'set_aside'
                ORDER BY event.id DESC
                LIMIT 1
            ),
            'queued before the trainer was installed'
        )
        WHEN NOT job.due AND job.run_after > clock_timestamp() THEN
            CASE WHEN job.attempt > 0 THEN 'retry scheduled' ELSE 'scheduled' END
        WHEN leased.here THEN 'its last run is still ending'
        WHEN workers.alive = 0 AND broken.hosts > 0 THEN 'every worker is out of service'
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
    SELECT count(*) AS hosts
    FROM public.training_workers AS worker
    WHERE worker.state = 'out_of_service'
      AND worker.last_seen_at > clock_timestamp() - interval '2 minutes'
) AS broken
CROSS JOIN LATERAL (
    SELECT count(*) AS jobs FROM public.training_leases AS lease WHERE lease.user_id = job.user_id
) AS running
CROSS JOIN LATERAL (
    SELECT EXISTS (SELECT FROM public.training_leases AS lease WHERE lease.job_id = job.id) AS here
) AS leased
WHERE job.status = 'queued';
