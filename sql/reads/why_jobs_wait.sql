-- Reads why some queued jobs wait, from their rows and the hosts' rows. No row for a job that is no longer queued.
SELECT queue.job_id, queue.waiting_reason
FROM public.training_queue AS queue
WHERE queue.job_id = ANY (%(ids)s::uuid[])
