-- Deletes the points after the step of a checkpoint from which a run resumes: they will be written again.
-- `held` = 0 means that the lease is lost and nothing was deleted.
WITH held AS MATERIALIZED (
    SELECT lease.job_id
    -- include: own_lease
),
forgotten AS (
    DELETE FROM metrics_points AS point
    USING held
    WHERE point.job_id = held.job_id
      AND point.step > %(after_step)s
    RETURNING 1
)
SELECT (SELECT count(*) FROM held) AS held, (SELECT count(*) FROM forgotten) AS forgotten
