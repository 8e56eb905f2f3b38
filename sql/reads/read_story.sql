-- Reads the events of some jobs after a given event id, oldest first.
SELECT event.id, event.job_id, event.at, event.kind, event.message, event.data
FROM public.training_events AS event
WHERE event.job_id = ANY (%(ids)s::uuid[])
  AND event.id > %(after)s
ORDER BY event.id
LIMIT %(limit)s
