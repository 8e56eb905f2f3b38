-- Claims the delivery that is due first, for `lock_seconds`. A claim whose lock has run out was lost: the next one gets a
-- number of its own, so that the stale host writes under other names. No row means that nothing is due here.
WITH picked AS MATERIALIZED (
    -- include: due_deliveries
    FOR UPDATE OF delivery SKIP LOCKED
)
UPDATE training_deliveries AS delivery
SET state = 'running',
    lock_token = gen_random_uuid(),
    locked_until = clock_timestamp() + %(lock_seconds)s::float8 * interval '1 second',
    -- Not due until then; from then on any host may take it.
    next_at = clock_timestamp() + %(lock_seconds)s::float8 * interval '1 second',
    worker_id = %(worker_id)s,
    attempts = delivery.attempts + 1,
    claims = delivery.claims + (delivery.state = 'running')::int,
    started_at = coalesce(delivery.started_at, clock_timestamp())
FROM picked, training_jobs AS job
WHERE delivery.id = picked.id
  AND job.id = delivery.job_id
RETURNING
    delivery.id, delivery.lock_token AS token, delivery.job_id, delivery.user_id, delivery.kind, delivery.target,
    delivery.attempts, delivery.claims, delivery.result AS earlier_result, job.lease_epoch, job.base_model,
    job.trained_with, job.hyperparameters, job.adapter_path, job.adapter_sha256, job.adapter_bytes, job.artifact_id
