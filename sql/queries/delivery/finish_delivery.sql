-- Ends a delivery well, with its result; what it has stored counts as whole from now on.
-- No row means that the lock is lost: another host does it again.
WITH done AS (
    UPDATE training_deliveries AS delivery
    SET state = 'done',
        result = %(result)s,
        error_code = NULL,
        error_message = NULL,
        error_hint = NULL,
        finished_at = clock_timestamp(),
        locked_until = NULL,
        lock_token = NULL
    WHERE delivery.id = %(id)s
      AND delivery.lock_token = %(token)s
    RETURNING delivery.id, delivery.job_id, delivery.kind, delivery.claims, delivery.result
),
whole AS (
    UPDATE training_uploads AS upload
    SET manifest_sha256 = done.result ->> 'manifest_sha256',
        bytes = (done.result ->> 'bytes')::bigint
    FROM done
    WHERE upload.job_id = done.job_id
      AND upload.epoch = done.claims
      AND upload.kind = done.kind
)
SELECT done.id FROM done
