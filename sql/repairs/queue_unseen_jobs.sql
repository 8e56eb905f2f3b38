-- Repairs waiting jobs that no claim can see: while triggers were off, they were inserted without what a claim reads.
-- Run as training_daemon. One row per job.
WITH unseen AS (
    SELECT job.id, needs.*
    FROM public.training_jobs AS job
    CROSS JOIN LATERAL public.training_read_needs(job.gpu_config, job.hyperparameters) AS needs
    WHERE job.status = 'queued'
      AND NOT job.held
      AND (NOT job.due AND job.run_after IS NULL OR job.queued_at IS NULL)
    FOR NO KEY UPDATE OF job
)
UPDATE public.training_jobs AS job
SET due = job.run_after IS NULL OR job.run_after <= clock_timestamp(),
    queued_at = coalesce(job.queued_at, job.created_at, clock_timestamp()),
    need_gpus = unseen.gpus,
    need_gpu_memory_gb = unseen.gpu_memory_gb,
    need_gpu_type = unseen.gpu_type,
    base_model = unseen.base_model
FROM unseen
WHERE job.id = unseen.id
RETURNING job.id
