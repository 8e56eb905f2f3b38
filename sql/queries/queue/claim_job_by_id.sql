-- Claims the job that a serverless host was called for, if it waits, no host holds it and this host can serve it.
-- Ignores the run_after of a new job, which only kept daemons away; a retry waits for its time as usual.
-- The caller has chosen this host, so neither the order of the queue nor the cap of running jobs applies.
-- One row if the job waits: claimed, or with what it needs and this host lacks (`lacking`, id null).
-- None if it is held, final, not due yet, or was queued before the installation.
WITH picked AS MATERIALIZED (
    SELECT job.id, job.user_id, job.dataset_id, job.lease_epoch, needs.lacking
    FROM training_jobs AS job
    CROSS JOIN LATERAL (
        -- The conditions of _candidates.sql, each with a text. They cannot be included, because each is reported here.
        SELECT array_remove(ARRAY[
            CASE WHEN job.need_gpus > %(free_gpus)s::int
                 THEN job.need_gpus || ' GPUs, and this host has ' || %(free_gpus)s::int END,
            CASE WHEN job.need_gpu_memory_gb * 0.95 > %(gpu_memory_gb)s::float8
                 THEN 'a GPU of ' || trim_scale(job.need_gpu_memory_gb) || ' GB, and this host''s has ' || %(gpu_memory_gb)s::float8 || ' GB' END,
            CASE WHEN strpos(lower(%(gpu_type)s::text), lower(job.need_gpu_type)) = 0
                 THEN 'a GPU of the type ' || job.need_gpu_type || ', and this host has ' || %(gpu_type)s::text END,
            CASE WHEN job.base_model <> ALL (%(models)s::text[])
                 THEN 'the model ' || job.base_model || ', and this host may load '
                      || array_to_string(%(models)s::text[], ', ') || ' only' END
        ], NULL) AS lacking
    ) AS needs
    WHERE job.id = %(job_id)s
      AND job.status = 'queued'
      AND NOT job.held
      AND (job.attempt = 0 OR job.run_after IS NULL OR job.run_after <= clock_timestamp())
      AND NOT EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = job.id)
    FOR NO KEY UPDATE OF job SKIP LOCKED
),
lease AS (
    INSERT INTO training_leases (job_id, epoch, worker_id, user_id, expires_at)
    SELECT picked.id, picked.lease_epoch + 1, %(worker_id)s, picked.user_id,
           clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second'
    FROM picked
    WHERE picked.lacking = '{}'
    ON CONFLICT DO NOTHING
    RETURNING job_id, epoch, token, claimed_at
),
claimed AS (
    -- include: take_job
)
SELECT picked.lacking, claimed.*
FROM picked
LEFT JOIN claimed ON true
