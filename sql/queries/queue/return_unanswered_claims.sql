-- Requeues jobs that this worker claimed without knowing, because the answer was lost; the attempt does not count.
-- One row per requeued job; none means that there were none.
WITH ended AS (
    DELETE FROM training_leases AS lease
    WHERE lease.worker_id = %(worker_id)s
      AND lease.job_id <> ALL (%(known)s::uuid[])
    RETURNING lease.job_id, lease.epoch
),
moved AS (
    UPDATE training_jobs AS job
    SET status = 'queued',
        current_stage = 'queued',
        attempt = greatest(job.attempt - 1, 0),
        run_after = NULL
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('initializing', 'running')
    RETURNING job.id, job.lease_epoch
),
told AS (
    INSERT INTO training_events (job_id, epoch, kind, message)
    SELECT moved.id, moved.lease_epoch, 'notice', 'The reply to the claim was lost. The job is claimed again.'
    FROM moved
)
SELECT moved.id FROM moved
