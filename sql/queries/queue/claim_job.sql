-- A daemon takes one job: the first due one that its host can serve, under a fresh lease.
-- One row; none when nothing was due, or when others were quicker with all candidates: peek_next_job tells which.
-- Every part is set up anew at each claim, by a server that slept a moment ago: fewer parts are a quicker claim.
WITH candidates AS MATERIALIZED (
    -- Every column here is in the index training_jobs_due. Memory with 5 percent tolerance: an 80 GB card says 79.6.
    SELECT job.id, job.priority, job.queued_at, job.base_model
    FROM training_jobs AS job
    WHERE job.due
      AND (%(free_gpus)s::int IS NULL OR job.need_gpus <= %(free_gpus)s::int)
      AND (%(gpu_memory_gb)s::float8 IS NULL OR job.need_gpu_memory_gb IS NULL
           OR job.need_gpu_memory_gb * 0.95 <= %(gpu_memory_gb)s::float8)
      AND (%(gpu_type)s::text IS NULL OR job.need_gpu_type IS NULL
           OR strpos(lower(%(gpu_type)s::text), lower(job.need_gpu_type)) > 0)
      AND (%(models)s::text[] IS NULL OR job.base_model IS NULL OR job.base_model = ANY (%(models)s::text[]))
      -- One array, asked for once: a capped user's waiting rows are passed over inside the index scan.
      AND (%(user_cap)s::int IS NULL OR job.user_id <> ALL (array(
          SELECT lease.user_id
          FROM training_leases AS lease
          GROUP BY lease.user_id
          HAVING count(*) >= %(user_cap)s::int
      )))
      -- What the database would let us neither claim nor set aside. Last: a capped user's rows are not asked.
      AND job.id <> ALL (%(skip)s::uuid[])
    ORDER BY job.priority DESC, job.queued_at, job.id
    LIMIT %(window)s
),
ordered AS NOT MATERIALIZED (
    -- Of equal priority, what finds its base model in memory goes first, but never before one that has waited long.
    -- Only the few candidates are sorted; the index has put them in order before.
    SELECT candidates.id
    FROM candidates
    ORDER BY
        candidates.priority DESC,
        CASE
            WHEN candidates.queued_at <= clock_timestamp() - %(warm_first_seconds)s::float8 * interval '1 second' THEN 0
            WHEN coalesce(candidates.base_model, '') = ANY (%(warm_models)s::text[]) THEN 1
            ELSE 2
        END,
        candidates.queued_at,
        candidates.id
),
picked AS MATERIALIZED (
    -- One after the other, in order, until one can be locked. NO KEY UPDATE: with FOR UPDATE a child row's insert
    -- in flight (KEY SHARE) would hide the job, and its wake-up would be lost.
    SELECT locked.*
    FROM ordered
    CROSS JOIN LATERAL (
        SELECT job.id, job.user_id, job.dataset_id, job.lease_epoch
        FROM training_jobs AS job
        WHERE job.id = ordered.id
          -- Not plain `due`: by primary key, never by the partial index again.
          AND coalesce(job.due, false)
          AND NOT EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = job.id)
        FOR NO KEY UPDATE OF job SKIP LOCKED
    ) AS locked
    LIMIT 1
),
lease AS (
    -- The cap is a numbered slot: two claims at once cannot both have it, and the loser writes nothing.
    INSERT INTO training_leases (job_id, epoch, worker_id, user_id, user_slot, expires_at)
    SELECT picked.id, picked.lease_epoch + 1, %(worker_id)s, picked.user_id, free.slot,
           clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second'
    FROM picked
    LEFT JOIN LATERAL (
        SELECT slot
        FROM generate_series(1, %(user_cap)s::int) AS slot
        WHERE NOT EXISTS (
            SELECT FROM training_leases AS taken
            WHERE taken.user_id = picked.user_id AND taken.user_slot = slot
        )
        LIMIT 1
    ) AS free ON true
    WHERE %(user_cap)s::int IS NULL OR free.slot IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING job_id, epoch, token, claimed_at
)
-- `due` and `run_after` are the guard's: named here, they would call the trigger that wakes other daemons.
UPDATE training_jobs AS job
SET status = 'initializing',
    current_stage = 'setup',
    lease_epoch = lease.epoch,
    lease_token = lease.token,
    attempt = job.attempt + 1,
    retry_count = job.attempt,
    progress = 0,
    current_epoch = 0,
    current_step = 0,
    started_at = coalesce(job.started_at, lease.claimed_at),
    completed_at = NULL,
    error_code = NULL,
    error_message = NULL,
    error_hint = NULL,
    error_stack = NULL,
    last_progress_at = lease.claimed_at
FROM lease
CROSS JOIN picked
LEFT JOIN datasets AS dataset ON dataset.id = picked.dataset_id
WHERE job.id = lease.job_id
RETURNING
    job.id,
    job.lease_epoch,
    job.lease_token,
    job.attempt,
    job.max_attempts,
    job.user_id,
    job.dataset_id,
    job.need_gpus,
    job.base_model,
    job.hyperparameters,
    job.gpu_config,
    job.dataset_url,
    job.callback_url,
    job.queued_at,
    lease.claimed_at,
    job.started_at,
    coalesce(job.current_cost, 0)::float8 AS spent,
    job.max_cost::float8 AS max_cost,
    job.deadline_at,
    dataset.storage_bucket,
    dataset.storage_path,
    dataset.user_id AS dataset_user_id,
    -- Which table the job was in: training_real_job says the same.
    job.tableoid || '/' || pg_relation_filenode(job.tableoid) AS tables
