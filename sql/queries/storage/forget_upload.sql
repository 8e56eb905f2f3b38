-- Deletes an upload's record: the objects are gone, or the job's own row names them.
-- No row means that another process did so first.
DELETE FROM training_uploads AS upload
WHERE upload.job_id = %(job_id)s
  AND upload.epoch = %(noted_epoch)s
  AND upload.kind = %(kind)s
  AND upload.step = %(step)s
RETURNING upload.job_id
