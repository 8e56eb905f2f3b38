-- Reads the checkpoints of a job that may be in this storage's bucket, whole or not, the latest attempt's newest first.
SELECT upload.job_id, upload.epoch, upload.kind, upload.step, upload.objects, upload.manifest_sha256
FROM training_uploads AS upload
WHERE upload.job_id = %(job_id)s
  AND upload.storage = %(storage)s
  AND upload.bucket = %(bucket)s
  AND upload.kind = 'checkpoint'
ORDER BY upload.epoch DESC, upload.step DESC
