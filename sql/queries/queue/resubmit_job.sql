-- An operator tries a failed or cancelled job again, from zero. Always one row; raises PT404 without such a job,
-- PT409 when it is neither failed nor cancelled.
SELECT retry_training_job(%(job_id)s) ->> 'state' AS state
