-- Included by claim_job and peek_next_job: which candidate is tried first.
-- Of equal priority, what finds its base model in memory goes first, but never before one that has waited long.
-- Only the few candidates are sorted; the index has put them in order before.
SELECT candidates.id
FROM candidates
ORDER BY
    candidates.priority DESC,
    CASE
        WHEN candidates.queued_at <= clock_timestamp() - %(warm_first_seconds)s::float8 * interval '1 second' THEN 0
        WHEN coalesce(candidates.base_model, '') = ANY (%(warm_models)s::text[]) THEN 1
        ELSE 2
    END,
    candidates.queued_at,
    candidates.id
