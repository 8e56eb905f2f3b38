-- Claims the first due job that this host can serve, under a new lease.
-- One row; none if nothing was due, or if others took all candidates first: peek_next_job tells which.
-- At each claim the server, idle until then, sets up every part of the plan: fewer parts make a faster claim.
WITH candidates AS MATERIALIZED (
    -- include: candidates
),
ordered AS NOT MATERIALIZED (
    -- include: candidates_in_order
),
picked AS MATERIALIZED (
    -- Tries one after the other until one can be locked. NO KEY UPDATE: with FOR UPDATE, a concurrent insert of a
    -- child row (KEY SHARE) would hide the job, and its wake-up would be lost.
    SELECT locked.*
    FROM ordered
    CROSS JOIN LATERAL (
        SELECT job.id, job.user_id, job.dataset_id, job.lease_epoch
        FROM training_jobs AS job
        WHERE job.id = ordered.id
          -- Not plain `due`, so that this uses the primary key and not the partial index again.
          AND coalesce(job.due, false)
          AND NOT EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = job.id)
        FOR NO KEY UPDATE OF job SKIP LOCKED
    ) AS locked
    LIMIT 1
),
lease AS (
    -- The cap uses numbered slots: two concurrent claims cannot both take one, and the loser writes nothing.
    INSERT INTO training_leases (job_id, epoch, worker_id, user_id, user_slot, expires_at)
    SELECT picked.id, picked.lease_epoch + 1, %(worker_id)s, picked.user_id, free.slot,
           clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second'
    FROM picked
    LEFT JOIN LATERAL (
        SELECT slot
        FROM generate_series(1, %(user_cap)s::int) AS slot
        WHERE NOT EXISTS (
            SELECT FROM training_leases AS taken
            WHERE taken.user_id = picked.user_id AND taken.user_slot = slot
        )
        LIMIT 1
    ) AS free ON true
    WHERE %(user_cap)s::int IS NULL OR free.slot IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING job_id, epoch, token, claimed_at
)
-- include: take_job
