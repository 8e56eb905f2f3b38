-- Requeues jobs that are marked as running but have no lease: it was not restored, so they would never end.
-- The attempt does not count. Run as training_daemon. One row per job.
WITH moved AS (
    UPDATE public.training_jobs AS job
    SET status = 'queued',
        current_stage = 'queued',
        attempt = greatest(job.attempt - 1, 0),
        run_after = NULL,
        estimated_completion_at = NULL
    WHERE job.status IN ('initializing', 'running')
      AND job.lease_epoch > 0
      AND NOT EXISTS (SELECT FROM public.training_leases AS lease WHERE lease.job_id = job.id)
    RETURNING job.id, job.lease_epoch
)
INSERT INTO public.training_events (job_id, epoch, kind, message)
SELECT
    moved.id, moved.lease_epoch, 'notice',
    'the database was restored without the lease of this run; the job waits again'
FROM moved
RETURNING job_id
