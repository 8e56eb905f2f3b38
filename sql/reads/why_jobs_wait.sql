-- Why some queued jobs wait. The view numbers the whole queue, so this is asked only where something is queued.
-- No row for a job that is no longer queued.
SELECT queue.job_id, queue.waiting_reason
FROM public.training_queue AS queue
WHERE queue.job_id = ANY (%(ids)s::uuid[])
