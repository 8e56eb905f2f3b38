-- Reads the job's last claim: who has lost the job asks whether its epoch was, or will be, given to another host as well.
-- No row means that the job was deleted.
SELECT job.lease_epoch, job.lease_token
FROM training_jobs AS job
WHERE job.id = %(job_id)s
