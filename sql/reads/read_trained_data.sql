-- Reads where a job's data are and how they were trained on. No row means that there is no such job.
SELECT
    job.id AS job_id,
    job.user_id,
    job.dataset_id,
    job.dataset_url,
    dataset.storage_bucket,
    dataset.storage_path,
    dataset.user_id AS dataset_user_id,
    dataset.name AS dataset_name,
    job.hyperparameters,
    job.trained_with,
    job.base_model,
    job.started_at
FROM public.training_jobs AS job
LEFT JOIN public.datasets AS dataset ON dataset.id = job.dataset_id
WHERE job.id = %(job_id)s
