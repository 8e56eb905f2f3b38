-- A caller over HTTP cancels a job. Always one row; raises PT404 without such a job, PT409 when it is already final.
SELECT cancel_training_job(%(job_id)s) ->> 'state' AS state
