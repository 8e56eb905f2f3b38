-- A caller over HTTP has no row: one is inserted, owned by the service's user. A repeated submit is the same job.
-- Always one row; submit_training_job() raises PT400 or PT409 for what cannot be a job.
SELECT (submit_training_job(%(job)s) ->> 'job_id')::uuid AS job_id
