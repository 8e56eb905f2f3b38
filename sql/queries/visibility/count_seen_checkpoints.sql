-- Counts the stored checkpoints of a job that we see, in any storage. Always one row.
SELECT count(*) AS seen
FROM training_uploads AS upload
WHERE upload.job_id = %(job_id)s
  AND upload.kind = 'checkpoint'
