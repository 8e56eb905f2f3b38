-- Why some queued jobs wait: their own rows and the hosts', not the queue. No row for a job that is no longer queued.
SELECT queue.job_id, queue.waiting_reason
FROM public.training_queue AS queue
WHERE queue.job_id = ANY (%(ids)s::uuid[])
