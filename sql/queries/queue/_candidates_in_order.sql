-- Included by claim_job and peek_next_job: the order in which candidates are tried.
-- At equal priority, a job whose base model is in memory goes first, but never before one that has waited long.
-- This sorts only the few candidates, which the index has already ordered.
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
