-- Replaces the estimates that the row was inserted with by the run's real size, and writes what it is trained with, as far
-- as either is known. The moment of the first step stays where an earlier attempt has trained the same model.
-- No row means that the lease is lost or the job cancelled.
UPDATE training_jobs AS job
SET total_steps = coalesce(%(total_steps)s::integer, job.total_steps),
    total_epochs = coalesce(%(total_epochs)s::integer, job.total_epochs),
    estimated_total_cost = coalesce(%(estimated_total_cost)s::numeric, job.estimated_total_cost),
    base_model = coalesce(%(trained_with)s::jsonb ->> 'base_model', job.base_model),
    trained_with = coalesce(
        %(trained_with)s::jsonb || CASE
            WHEN job.trained_with -> 'base_model' = %(trained_with)s::jsonb -> 'base_model'
                 AND job.trained_with -> 'first_step_at' IS NOT NULL
            THEN jsonb_build_object('first_step_at', job.trained_with -> 'first_step_at')
            ELSE '{}'
        END,
        job.trained_with
    ),
    last_progress_at = clock_timestamp()
WHERE job.id = %(job_id)s
  AND (job.lease_epoch, job.lease_token) = (%(epoch)s, %(token)s)
  AND job.status IN ('initializing', 'running')
RETURNING job.id
