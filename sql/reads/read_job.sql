-- Reads one job completely: its spec, its data, its host, its result.
SELECT
    job.preset_id,
    job.hyperparameters,
    job.gpu_config,
    job.dataset_id,
    dataset.name AS dataset_name,
    -- Without the query, which may contain a signature.
    coalesce(regexp_replace(split_part(split_part(job.dataset_url, '?', 1), '#', 1), '//[^/@]*@', '//'),
        dataset.storage_bucket || '/' || dataset.storage_path) AS dataset_source,
    job.client_job_id,
    job.run_after,
    job.deadline_at,
    job.max_cost::float8 AS max_cost,
    job.estimated_total_cost::float8 AS estimated_total_cost,
    job.lease_epoch,
    job.adapter_sha256,
    job.adapter_bytes,
    job.result,
    job.trained_with,
    job.error_stack,
    (SELECT lease.worker_id FROM public.training_leases AS lease WHERE lease.job_id = job.id) AS worker_id
FROM public.training_jobs AS job
LEFT JOIN public.datasets AS dataset ON dataset.id = job.dataset_id
WHERE job.id = %(job_id)s
