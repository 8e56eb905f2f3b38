-- A daemon takes callbacks to deliver: of each host the first that is due and none while one is on its way there,
-- so that a dead host holds up nobody else, wears out no other callback's attempts, and gets them in their order.
-- One row a callback; none means that nothing is due. Unanswered by locked_until, a callback is due again.
WITH RECURSIVE hosts AS (
    -- From host to host along the index training_callbacks_pending, one probe each.
    (
        SELECT callback.host
        FROM training_callbacks AS callback
        WHERE callback.state = 'pending'
        ORDER BY callback.host
        LIMIT 1
    )
    UNION ALL
    SELECT (
        SELECT callback.host
        FROM training_callbacks AS callback
        WHERE callback.state = 'pending' AND callback.host > hosts.host
        ORDER BY callback.host
        LIMIT 1
    )
    FROM hosts
    WHERE hosts.host IS NOT NULL
),
picked AS MATERIALIZED (
    SELECT first.id
    FROM hosts
    CROSS JOIN LATERAL (
        SELECT callback.id
        FROM training_callbacks AS callback
        WHERE callback.state = 'pending'
          AND callback.host = hosts.host
          AND callback.next_at <= statement_timestamp()
          AND callback.id <> ALL (%(skip)s::uuid[])
          AND (%(only)s::uuid IS NULL OR callback.id = %(only)s::uuid)
        ORDER BY callback.next_at, callback.sequence
        LIMIT 1
        FOR UPDATE SKIP LOCKED
    ) AS first
    WHERE hosts.host IS NOT NULL
      AND NOT EXISTS (
          -- A callback that is on its way has its next_at at the end of its lock: a short stretch of the index.
          -- The statement's time, not the clock's: a volatile bound cannot be searched for in an index.
          SELECT FROM training_callbacks AS busy
          WHERE busy.state = 'pending'
            AND busy.host = hosts.host
            AND busy.next_at > statement_timestamp()
            AND busy.next_at <= statement_timestamp() + %(lock_seconds)s::float8 * interval '1 second'
            AND busy.locked_until > clock_timestamp()
      )
    LIMIT %(limit)s
)
UPDATE training_callbacks AS callback
SET lock_token = gen_random_uuid(),
    locked_until = clock_timestamp() + %(lock_seconds)s::float8 * interval '1 second',
    -- Not due until then; the host's next callback waits for this one to be settled.
    next_at = clock_timestamp() + %(lock_seconds)s::float8 * interval '1 second',
    attempts = callback.attempts + 1
FROM picked
WHERE callback.id = picked.id
RETURNING
    callback.id, callback.lock_token AS token, callback.job_id, callback.sequence, callback.url, callback.host,
    callback.event, callback.payload, callback.attempts, callback.created_at
