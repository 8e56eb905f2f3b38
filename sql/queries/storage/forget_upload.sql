-- The objects are gone, or the job's own row names them.
-- No row: somebody else was quicker.
DELETE FROM training_uploads AS upload
WHERE upload.job_id = %(job_id)s
  AND upload.epoch = %(noted_epoch)s
  AND upload.kind = %(kind)s
  AND upload.step = %(step)s
RETURNING upload.job_id
