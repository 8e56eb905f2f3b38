-- Reads where one file of a completed job is. No row means that the job has no such file.
SELECT split_part(job.adapter_path, '/', 1) AS bucket, job.result -> 'artifacts' ->> %(name)s AS path
FROM public.training_jobs AS job
WHERE job.id = %(job_id)s
  AND job.status = 'completed'
  AND job.adapter_path IS NOT NULL
  AND jsonb_typeof(job.result -> 'artifacts' -> %(name)s) = 'string'
