-- Reads the hosts that were seen since a given time, and the last one on each given pod, with the leases they hold and
-- the deliveries they work on, which take no slot.
-- No row means that no host is alive.
SELECT
    worker.id,
    worker.pod,
    worker.device,
    worker.gpu_count,
    worker.gpu_memory_gb,
    worker.gpu_type,
    worker.models,
    worker.slots,
    worker.busy,
    worker.state,
    worker.last_seen_at,
    (SELECT count(*) FROM training_leases AS lease WHERE lease.worker_id = worker.id) AS leases,
    (
        SELECT count(*)
        FROM training_deliveries AS delivery
        WHERE delivery.worker_id = worker.id
          AND delivery.state = 'running'
          AND delivery.locked_until > clock_timestamp()
    ) AS deliveries,
    -- A heartbeat renews this lease: the host works, even if it does not touch its own row.
    (
        SELECT count(*)
        FROM training_leases AS lease
        WHERE lease.worker_id = worker.id AND lease.expires_at > clock_timestamp()
    ) AS live_leases
FROM training_workers AS worker
WHERE worker.last_seen_at > %(since)s
   OR worker.pod = ANY (%(pods)s)
ORDER BY worker.last_seen_at
