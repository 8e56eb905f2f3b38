-- Makes a name at an endpoint mean this job's adapter, unless another owner has it or a newer adapter is served by it.
-- With `in_use`, the endpoint serves something under this name: then it must have come from us.
-- Always one row: whether it is taken, whose it was before if not ours, and the jobs that it meant before.
WITH mine AS (
    SELECT job.id, job.user_id, coalesce(job.completed_at, job.created_at) AS completed_at
    FROM training_jobs AS job
    WHERE job.id = %(job_id)s
),
taken AS (
    INSERT INTO training_served_names AS served (endpoint, name, user_id, job_id, completed_at)
    SELECT %(endpoint)s, %(name)s, mine.user_id, mine.id, mine.completed_at
    FROM mine
    WHERE NOT %(in_use)s
       OR EXISTS (
           SELECT
           FROM training_served_names AS known
           WHERE known.endpoint = %(endpoint)s
             AND known.name = %(name)s
       )
    ON CONFLICT (endpoint, name) DO UPDATE
    SET job_id = excluded.job_id,
        completed_at = excluded.completed_at,
        superseded = CASE
            WHEN served.job_id = excluded.job_id THEN served.superseded
            ELSE array_remove(served.superseded, excluded.job_id) || served.job_id
        END,
        taken_at = clock_timestamp()
    WHERE served.user_id = excluded.user_id
      AND served.completed_at <= excluded.completed_at
    RETURNING served.superseded
)
SELECT
    EXISTS (SELECT FROM taken) AS is_taken,
    coalesce((SELECT taken.superseded FROM taken), '{}') AS superseded,
    EXISTS (
        SELECT
        FROM training_served_names AS served
        JOIN mine ON served.user_id = mine.user_id
        WHERE served.endpoint = %(endpoint)s
          AND served.name = %(name)s
    ) AS is_ours
