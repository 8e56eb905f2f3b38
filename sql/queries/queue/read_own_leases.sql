-- Reads which jobs this worker holds. No row means that it holds none.
SELECT lease.job_id
FROM training_leases AS lease
WHERE lease.worker_id = %(worker_id)s
