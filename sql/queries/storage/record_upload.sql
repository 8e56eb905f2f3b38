-- Records objects that may be in this storage's bucket from now on, before the first byte is sent.
-- No row means that the lease is lost: nothing may be stored.
INSERT INTO training_uploads AS upload (job_id, epoch, kind, step, storage, bucket, objects)
SELECT held.job_id, held.epoch, %(kind)s, %(step)s, %(storage)s, %(bucket)s, %(objects)s
FROM (
    SELECT lease.job_id, lease.epoch
    -- include: own_lease
) AS held
ON CONFLICT (job_id, epoch, kind, step) DO UPDATE
SET storage = excluded.storage,
    bucket = excluded.bucket,
    objects = excluded.objects,
    manifest_sha256 = NULL,
    bytes = NULL,
    noted_at = clock_timestamp()
RETURNING upload.job_id
