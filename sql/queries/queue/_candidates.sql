-- Included by claim_job and peek_next_job: the first due jobs that this host can serve, in claiming order.
-- Four other texts check what a host can serve and cannot include this one: claim_job_by_id and
-- daemon/serverless/memory_job_store.py (what the host lacks, in words), the view training_queue (why a job waits) and
-- daemon/fleet/rules.py (whether a host or a pod has room). tests/queue/test_what_a_host_serves.py compares them.
-- Every column here is in the index training_jobs_due. Memory has 5 percent tolerance: an 80 GB GPU reports 79.6.
SELECT job.id, job.priority, job.queued_at, job.base_model
FROM training_jobs AS job
WHERE job.due
  AND (%(free_gpus)s::int IS NULL OR job.need_gpus <= %(free_gpus)s::int)
  AND (%(gpu_memory_gb)s::float8 IS NULL OR job.need_gpu_memory_gb IS NULL
       OR job.need_gpu_memory_gb * 0.95 <= %(gpu_memory_gb)s::float8)
  AND (%(gpu_type)s::text IS NULL OR job.need_gpu_type IS NULL
       OR strpos(lower(%(gpu_type)s::text), lower(job.need_gpu_type)) > 0)
  AND (%(models)s::text[] IS NULL OR job.base_model IS NULL OR job.base_model = ANY (%(models)s::text[]))
  -- One array, computed once: the index scan skips the waiting rows of users at their cap.
  AND (%(user_cap)s::int IS NULL OR job.user_id <> ALL (array(
      SELECT lease.user_id
      FROM training_leases AS lease
      GROUP BY lease.user_id
      HAVING count(*) >= %(user_cap)s::int
  )))
  -- Jobs that the database lets us neither claim nor set aside. Last, so that it is not checked for capped users.
  AND job.id <> ALL (%(skip)s::uuid[])
ORDER BY job.priority DESC, job.queued_at, job.id
LIMIT %(window)s
