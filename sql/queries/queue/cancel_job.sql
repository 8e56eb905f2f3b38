-- Cancels a job for a caller over HTTP. Always one row; raises PT404 if there is no such job, PT409 if it is final.
SELECT cancel_training_job(%(job_id)s) ->> 'state' AS state
