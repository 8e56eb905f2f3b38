-- Reads which job a claim would take, and where its dataset is, without taking or locking anything.
-- It includes the same text as claim_job to choose. No row means that nothing is due here.
WITH candidates AS MATERIALIZED (
    -- include: candidates
),
ordered AS NOT MATERIALIZED (
    -- include: candidates_in_order
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
