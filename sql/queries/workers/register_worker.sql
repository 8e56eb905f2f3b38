-- Registers a daemon after its start. Repeated after an outage, it brings the row up to date. Always one row.
INSERT INTO training_workers AS worker
    (id, host, pod, device, gpus, gpu_count, gpu_memory_gb, gpu_type, models, slots, user_cap, versions)
VALUES (
    %(id)s, %(host)s, %(pod)s, %(device)s, %(gpus)s, %(gpu_count)s, %(gpu_memory_gb)s, %(gpu_type)s, %(models)s,
    %(slots)s, %(user_cap)s, %(versions)s
)
ON CONFLICT (id) DO UPDATE
SET host = excluded.host,
    pod = excluded.pod,
    device = excluded.device,
    gpus = excluded.gpus,
    gpu_count = excluded.gpu_count,
    gpu_memory_gb = excluded.gpu_memory_gb,
    gpu_type = excluded.gpu_type,
    models = excluded.models,
    slots = excluded.slots,
    user_cap = excluded.user_cap,
    versions = excluded.versions,
    last_seen_at = clock_timestamp()
RETURNING worker.id
