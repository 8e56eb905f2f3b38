-- Reads the head of the queue in the order of training_queue, why each of these jobs waits, and how many wait in total.
-- No row means that none waits. Due jobs are read in the order of their index, others only if there is room, and only
-- jobs that are shown get a reason: the queue is counted, never sorted.
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
-- Row by row, which OFFSET forces: the planner does not know how few there are.
CROSS JOIN LATERAL (
    SELECT queue.waiting_reason FROM public.training_queue AS queue WHERE queue.job_id = head.id OFFSET 0
) AS reason
ORDER BY head.is_due DESC, head.priority DESC, head.queued_at, head.id
