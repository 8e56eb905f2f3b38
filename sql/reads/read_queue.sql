-- The head of the queue in the order of training_queue, why each job of it waits, and how many wait in all. No row:
-- nothing waits. What is due is read in its index's order, what is not due only where there is room for it, and a
-- reason is found for what is shown: the queue is counted, never sorted.
WITH due AS MATERIALIZED (
    SELECT job.id, job.priority, job.queued_at
    FROM public.training_jobs AS job
    WHERE job.due
    ORDER BY job.priority DESC, job.queued_at, job.id
    LIMIT %(most)s
),
later AS MATERIALIZED (
    SELECT job.id, job.priority, job.queued_at
    FROM public.training_jobs AS job
    WHERE job.status = 'queued' AND NOT job.due
    ORDER BY job.priority DESC, job.queued_at, job.id
    LIMIT %(most)s - (SELECT count(*) FROM due)
),
head AS MATERIALIZED (
    SELECT due.*, true AS is_due FROM due
    UNION ALL
    SELECT later.*, false AS is_due FROM later
)
SELECT
    head.id::text AS job_id,
    reason.waiting_reason,
    (SELECT count(*) FROM public.training_jobs AS job WHERE job.status = 'queued')::int AS waiting
FROM head
-- Row by row, as OFFSET makes it: the planner cannot know how few there are.
CROSS JOIN LATERAL (
    SELECT queue.waiting_reason FROM public.training_queue AS queue WHERE queue.job_id = head.id OFFSET 0
) AS reason
ORDER BY head.is_due DESC, head.priority DESC, head.queued_at, head.id
