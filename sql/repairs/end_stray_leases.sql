-- Deletes leases of no run: their job is gone, has ended, or is at another epoch. They block the next claim.
-- Run as training_daemon. One row per lease.
DELETE FROM public.training_leases AS lease
WHERE NOT EXISTS (
    SELECT
    FROM public.training_jobs AS job
    WHERE job.id = lease.job_id
      AND job.lease_epoch = lease.epoch
      AND job.status NOT IN ('completed', 'failed')
)
RETURNING lease.job_id
