-- Reads what the row of a submitted job says, to compare it with what was submitted.
-- No row means that there is no such job.
SELECT job.hyperparameters, job.gpu_config, job.dataset_url, dataset.storage_bucket, dataset.storage_path, job.callback_url
FROM training_jobs AS job
LEFT JOIN datasets AS dataset ON dataset.id = job.dataset_id
WHERE job.id = %(job_id)s
