-- Reads which job a claim would take, and where its dataset lies, without taking or locking anything.
-- The first parts are claim_job's, word for word: a test compares. No row means that nothing is due here.
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
)
SELECT next.*
FROM ordered
CROSS JOIN LATERAL (
    SELECT
        job.id AS job_id,
        job.user_id,
        job.dataset_id,
        job.dataset_url,
        dataset.storage_bucket,
        dataset.storage_path,
        dataset.user_id AS dataset_user_id
    FROM training_jobs AS job
    LEFT JOIN datasets AS dataset ON dataset.id = job.dataset_id
    WHERE job.id = ordered.id
      AND coalesce(job.due, false)
      AND NOT EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = job.id)
) AS next
LIMIT 1
