-- Reads the job's last claim: a host that lost the job checks whether another host has, or will get, the same epoch.
-- No row means that the job was deleted.
SELECT job.lease_epoch, job.lease_token
FROM training_jobs AS job
WHERE job.id = %(job_id)s
