-- Requeues jobs whose leases expired during a restore into this database: no host has died, so no attempt counts.
-- A host that still trains under such a lease has renewed it and keeps it. Run as training_daemon. One row per job.
WITH ended AS (
    DELETE FROM public.training_leases AS lease
    WHERE lease.claimed_at < %(since)s::timestamptz
      AND lease.expires_at < clock_timestamp()
    RETURNING lease.job_id, lease.epoch
),
moved AS (
    UPDATE public.training_jobs AS job
    SET status = 'queued',
        current_stage = 'queued',
        attempt = greatest(job.attempt - 1, 0),
        run_after = NULL,
        estimated_completion_at = NULL
    FROM ended
    WHERE job.id = ended.job_id
      AND job.lease_epoch = ended.epoch
      AND job.status IN ('initializing', 'running')
    RETURNING job.id, job.lease_epoch
)
INSERT INTO public.training_events (job_id, epoch, kind, message)
SELECT
    moved.id, moved.lease_epoch, 'notice',
    'the database was restored from before this run ended; the job waits again'
FROM moved
RETURNING job_id
