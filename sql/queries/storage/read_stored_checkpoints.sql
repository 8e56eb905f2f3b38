-- The checkpoints of a job that may lie in this storage's bucket, the latest attempt's newest first, whole or not.
SELECT upload.job_id, upload.epoch, upload.kind, upload.step, upload.objects, upload.manifest_sha256
FROM training_uploads AS upload
WHERE upload.job_id = %(job_id)s
  AND upload.storage = %(storage)s
  AND upload.bucket = %(bucket)s
  AND upload.kind = 'checkpoint'
ORDER BY upload.epoch DESC, upload.step DESC
