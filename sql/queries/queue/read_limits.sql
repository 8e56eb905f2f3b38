-- Reads what a job may cost and how long it may still take; the app may change both while it runs.
-- No row means that the job was deleted.
SELECT job.max_cost::float8 AS max_cost,
       extract(epoch FROM job.deadline_at - clock_timestamp())::float8 AS seconds_left
FROM training_jobs AS job
WHERE job.id = %(job_id)s
