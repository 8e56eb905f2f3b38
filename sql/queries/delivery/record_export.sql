-- Records the objects of an export before the first byte is sent. No row means that the lock is lost: nothing may be stored.
INSERT INTO training_uploads AS upload (job_id, epoch, kind, step, storage, bucket, objects)
SELECT held.job_id, held.claims, held.kind, 0, %(storage)s, %(bucket)s, %(objects)s
FROM (
    SELECT delivery.job_id, delivery.claims, delivery.kind
    FROM training_deliveries AS delivery
    WHERE delivery.id = %(id)s
      AND delivery.lock_token = %(token)s
    FOR SHARE
) AS held
ON CONFLICT (job_id, epoch, kind, step) DO UPDATE
SET storage = excluded.storage,
    bucket = excluded.bucket,
    objects = excluded.objects,
    manifest_sha256 = NULL,
    bytes = NULL,
    noted_at = clock_timestamp()
RETURNING upload.job_id
