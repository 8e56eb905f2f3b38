-- Restarts a failed or cancelled job from zero. Always one row; raises PT404 if there is no such job,
-- PT409 if it is neither failed nor cancelled.
SELECT retry_training_job(%(job_id)s) ->> 'state' AS state
