-- Reads which objects attempts at a job may have stored of its adapter in this storage's bucket, the latest attempt's first.
SELECT upload.job_id, upload.epoch, upload.kind, upload.step, upload.objects
FROM training_uploads AS upload
WHERE upload.job_id = %(job_id)s
  AND upload.storage = %(storage)s
  AND upload.bucket = %(bucket)s
  AND upload.kind = 'adapter'
ORDER BY upload.epoch DESC
