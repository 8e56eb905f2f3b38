-- Finds jobs whose id begins with what a person typed, as a range of uuids, so that it uses the primary key.
-- At most five: enough to report that there are several. No row means that there is no such job.
SELECT job.id
FROM public.training_jobs AS job
WHERE job.id BETWEEN %(low)s::uuid AND %(high)s::uuid
ORDER BY job.id
LIMIT 5
