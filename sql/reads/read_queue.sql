-- The head of the queue in claiming order, why each job waits, and how many wait in all. No row: nothing waits.
SELECT queue.job_id::text AS job_id, queue.waiting_reason, count(*) OVER ()::int AS waiting
FROM public.training_queue AS queue
ORDER BY queue.place
LIMIT %(most)s
