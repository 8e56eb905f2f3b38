-- Claims callbacks to deliver: for each receiving host the first that is due, and none while another is being sent
-- there. So a dead host delays no other, uses up no other callback's attempts, and gets its callbacks in order.
-- One row per callback; none means that nothing is due. A callback not settled by locked_until is due again.
WITH RECURSIVE hosts AS (
    -- From host to host along the index training_callbacks_pending, one probe for each.
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
          -- A callback that is being sent has its next_at at the end of its lock: a short range of the index.
          -- The statement's time, not the clock's: an index cannot be searched by a volatile value.
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
    -- Not due until then; the host's next callback waits until this one is settled.
    next_at = clock_timestamp() + %(lock_seconds)s::float8 * interval '1 second',
    attempts = callback.attempts + 1
FROM picked
WHERE callback.id = picked.id
RETURNING
    callback.id, callback.lock_token AS token, callback.job_id, callback.sequence, callback.url, callback.host,
    callback.event, callback.payload, callback.attempts, callback.created_at
