-- Records that a checkpoint is stored completely and was read back, so that another host may resume from it.
-- No row means that the lease is lost, or that the upload was not recorded.
UPDATE training_uploads AS upload
SET manifest_sha256 = %(manifest_sha256)s,
    bytes = %(bytes)s
FROM (
    SELECT lease.job_id, lease.epoch
    -- include: own_lease
) AS held
WHERE upload.job_id = held.job_id
  AND upload.epoch = held.epoch
  AND upload.kind = 'checkpoint'
  AND upload.step = %(step)s
RETURNING upload.job_id
