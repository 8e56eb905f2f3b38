-- The stored adapter was verified: the job is completed and its lease ends.
-- Always one row. `ended` = 0: the lease is lost. `ended` = 1 and no state: the job was cancelled meanwhile.
-- `noted`: something of the job may lie in Storage.
WITH ended AS (
    DELETE FROM training_leases AS lease
    WHERE lease.job_id = %(job_id)s
      AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
    RETURNING lease.job_id, lease.epoch
),
moved AS (
    UPDATE training_jobs AS job
    SET status = 'completed',
        current_stage = 'completed',
        progress = 100,
        completed_at = clock_timestamp(),
        estimated_completion_at = NULL,
        last_progress_at = clock_timestamp(),
        current_cost = coalesce(%(cost)s::numeric, job.current_cost),
        final_cost = coalesce(%(cost)s::numeric, job.current_cost),
        adapter_path = %(adapter_path)s,
        adapter_sha256 = %(adapter_sha256)s,
        adapter_bytes = %(adapter_bytes)s,
        result = %(result)s
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('initializing', 'running')
    RETURNING job.status
)
SELECT
    (SELECT count(*) FROM ended) AS ended,
    (SELECT moved.status FROM moved) AS state,
    EXISTS (SELECT FROM training_uploads AS upload WHERE upload.job_id = %(job_id)s) AS noted
