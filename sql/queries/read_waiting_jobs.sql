-- Reads what waits for a host: the first due jobs in claiming order, what they need, how many jobs their owners run.
-- No row means that nothing waits.
SELECT
    job.id,
    job.user_id,
    job.need_gpus,
    job.need_gpu_memory_gb::float8 AS need_gpu_memory_gb,
    job.need_gpu_type,
    job.base_model,
    job.queued_at,
    (SELECT count(*) FROM training_leases AS lease WHERE lease.user_id = job.user_id) AS running
FROM training_jobs AS job
WHERE job.due
  AND NOT EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = job.id)
ORDER BY job.priority DESC, job.queued_at, job.id
LIMIT %(most)s
