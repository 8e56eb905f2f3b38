-- Reads how many leases are kept alive by hosts without a row: on which pod they work nobody can tell. Always one row.
SELECT count(*) AS leases
FROM training_leases AS lease
WHERE lease.expires_at > clock_timestamp()
  AND NOT EXISTS (SELECT FROM training_workers AS worker WHERE worker.id = lease.worker_id)
