-- Reads the first due jobs in claiming order, what they need, and how many jobs their owners run.
-- Leaves out users at their cap, so that thousands of their rows do not hide the others. No row means that none waits.
WITH blocked AS MATERIALIZED (
    SELECT array(
        SELECT lease.user_id
        FROM training_leases AS lease
        WHERE %(user_cap)s::int IS NOT NULL
        GROUP BY lease.user_id
        HAVING count(*) >= %(user_cap)s::int
    ) AS users
),
candidates AS MATERIALIZED (
    -- Every column here is in the index training_jobs_due.
    SELECT job.id
    FROM training_jobs AS job
    WHERE job.due
      AND job.user_id <> ALL ((SELECT blocked.users FROM blocked)::uuid[])
    ORDER BY job.priority DESC, job.queued_at, job.id
    LIMIT %(most)s
)
SELECT
    job.id,
    job.user_id,
    job.need_gpus,
    job.need_gpu_memory_gb::float8 AS need_gpu_memory_gb,
    job.need_gpu_type,
    job.base_model,
    job.queued_at,
    (SELECT count(*) FROM training_leases AS lease WHERE lease.user_id = job.user_id) AS running
FROM candidates
JOIN training_jobs AS job ON job.id = candidates.id
-- A job that was cancelled and submitted again can be claimed only after its last run has ended.
WHERE NOT EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = job.id)
ORDER BY job.priority DESC, job.queued_at, job.id
