-- Counts the rows that the other statements of this folder would repair. Always one row.
SELECT
    (
        SELECT count(*)
        FROM public.training_jobs AS job
        WHERE job.status = 'queued'
          AND NOT job.held
          AND (NOT job.due AND job.run_after IS NULL OR job.queued_at IS NULL)
    ) AS queue_unseen_jobs,
    (
        SELECT count(*)
        FROM public.training_jobs AS job
        WHERE job.status IN ('initializing', 'running')
          AND job.lease_epoch > 0
          AND NOT EXISTS (SELECT FROM public.training_leases AS lease WHERE lease.job_id = job.id)
    ) AS return_jobs_without_lease,
    (
        SELECT count(*)
        FROM public.training_leases AS lease
        WHERE NOT EXISTS (
            SELECT
            FROM public.training_jobs AS job
            WHERE job.id = lease.job_id
              AND job.lease_epoch = lease.epoch
              AND job.status NOT IN ('completed', 'failed')
        )
    ) AS end_stray_leases,
    (
        SELECT count(*)
        FROM public.training_leases AS lease
        WHERE lease.claimed_at < %(since)s::timestamptz AND lease.expires_at < clock_timestamp()
    ) AS return_restored_leases
