-- Included by both claims: starts an attempt of the leased job, and returns everything that the attempt needs.
-- The guard sets `due` and `run_after`: naming them here would fire the trigger that wakes other daemons.
UPDATE training_jobs AS job
SET status = 'initializing',
    current_stage = 'setup',
    lease_epoch = lease.epoch,
    lease_token = lease.token,
    attempt = job.attempt + 1,
    retry_count = job.attempt,
    progress = 0,
    current_epoch = 0,
    current_step = 0,
    started_at = coalesce(job.started_at, lease.claimed_at),
    completed_at = NULL,
    error_code = NULL,
    error_message = NULL,
    error_hint = NULL,
    error_stack = NULL,
    last_progress_at = lease.claimed_at
FROM lease
CROSS JOIN picked
LEFT JOIN datasets AS dataset ON dataset.id = picked.dataset_id
WHERE job.id = lease.job_id
RETURNING
    job.id,
    job.lease_epoch,
    job.lease_token,
    job.attempt,
    job.max_attempts,
    job.user_id,
    job.dataset_id,
    job.need_gpus,
    job.base_model,
    job.hyperparameters,
    job.gpu_config,
    job.dataset_url,
    job.callback_url,
    job.queued_at,
    lease.claimed_at,
    job.started_at,
    coalesce(job.current_cost, 0)::float8 AS spent,
    job.max_cost::float8 AS max_cost,
    job.deadline_at,
    dataset.storage_bucket,
    dataset.storage_path,
    dataset.user_id AS dataset_user_id,
    -- The table that the job was in, in the same form as training_real_job.
    job.tableoid || '/' || pg_relation_filenode(job.tableoid) AS tables
