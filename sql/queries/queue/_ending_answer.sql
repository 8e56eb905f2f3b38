-- Included by the statements that end an attempt. Always one row. `ended` = 0: the lease is lost.
-- `ended` = 1 and no state: the job was cancelled meanwhile. `noted`: Storage may contain objects of the job.
SELECT
    (SELECT count(*) FROM ended) AS ended,
    (SELECT moved.status FROM moved) AS state,
    EXISTS (SELECT FROM training_uploads AS upload WHERE upload.job_id = %(job_id)s) AS noted
