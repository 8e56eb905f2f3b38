-- Records an event that the database refuses both to claim this job and to hold it. Always one row while there is such
-- a job.
INSERT INTO training_events (job_id, epoch, kind, message)
SELECT job.id, job.lease_epoch, 'set_aside', %(reason)s
FROM training_jobs AS job
WHERE job.id = %(job_id)s
RETURNING training_events.job_id
