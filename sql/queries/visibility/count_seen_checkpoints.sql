-- How many stored checkpoints of a job we see, in whichever storage they lie. Always one row.
SELECT count(*) AS seen
FROM training_uploads AS upload
WHERE upload.job_id = %(job_id)s
  AND upload.kind = 'checkpoint'
