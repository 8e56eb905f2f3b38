-- Deletes the points after the step of a checkpoint from which a run resumes (they will be written again), and thins the
-- others where there are more than `most`: evenly, to about half as many. The first and the last stay, and those with a
-- validation loss unless they alone are more than that. `held` = 0 means that the lease is lost and nothing was deleted;
-- `remaining`: how many points there are now.
WITH held AS MATERIALIZED (
    SELECT lease.job_id
    -- include: own_lease
),
earlier AS MATERIALIZED (
    SELECT
        point.id,
        row_number() OVER (ORDER BY point.step) AS place,
        count(*) OVER () AS points,
        point.validation_loss IS NOT NULL AND count(point.validation_loss) OVER () <= %(most)s::int / 2 AS stays
    FROM metrics_points AS point
    JOIN held ON held.job_id = point.job_id
    WHERE point.step <= coalesce(%(after_step)s::int, 2147483647)
),
spare AS MATERIALIZED (
    SELECT earlier.id
    FROM earlier
    WHERE earlier.points > %(most)s::int
      AND NOT earlier.stays
      AND earlier.place > 1
      AND earlier.place < earlier.points
      -- Every second of a few too many.
      AND (earlier.place - 1) %% (earlier.points / greatest(%(most)s::int / 2, 1)) <> 0
),
forgotten AS (
    DELETE FROM metrics_points AS point
    USING held
    WHERE point.job_id = held.job_id
      AND (point.step > %(after_step)s::int OR point.id IN (SELECT spare.id FROM spare))
    RETURNING 1
)
SELECT
    (SELECT count(*) FROM held) AS held,
    (SELECT count(*) FROM forgotten) AS forgotten,
    (SELECT count(*) FROM earlier) - (SELECT count(*) FROM spare) AS remaining
