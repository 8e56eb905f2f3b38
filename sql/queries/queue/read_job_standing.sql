-- Reads a job's status for a caller over HTTP. `state` is lost as soon as its lease has expired.
-- No row means that there is no such job.
SELECT job.state, job.contract, job.lease_expires_at
FROM training_job_status AS job
WHERE job.job_id = %(job_id)s
