-- Reads how many live leases belong to hosts without a row; their pods are unknown. Always one row.
SELECT count(*) AS leases
FROM training_leases AS lease
WHERE lease.expires_at > clock_timestamp()
  AND NOT EXISTS (SELECT FROM training_workers AS worker WHERE worker.id = lease.worker_id)
