-- What nobody needs any more, at most so many: adapters that no completed row names, checkpoints of jobs that are
-- completed, gone, or long since failed or cancelled. Nothing of a job that somebody holds. A job that we do not see is
-- gone only where that is certain, and where the caller asks for such (`orphans`); a lease that we do not see holds.
-- `named` is true where the job's row names the adapter: only the note is to be forgotten then.
SELECT
    upload.job_id,
    upload.epoch,
    upload.kind,
    upload.step,
    upload.objects,
    upload.manifest_sha256,
    coalesce(
        job.status = 'completed'
        AND upload.kind = 'adapter'
        AND job.adapter_path = upload.bucket || '/' || upload.objects[1],
        false
    ) AS named
FROM training_uploads AS upload
LEFT JOIN training_jobs AS job ON job.id = upload.job_id
CROSS JOIN LATERAL training_find_job(upload.job_id) AS found
WHERE upload.storage = %(storage)s
  AND upload.bucket = %(bucket)s
  AND (%(job_id)s::uuid IS NULL OR upload.job_id = %(job_id)s)
  AND upload.noted_at <= clock_timestamp() - %(idle_seconds)s * interval '1 second'
  AND found.can_tell
  AND found.holder IS NULL
  AND (
      %(orphans)s AND NOT found.job_exists
      OR job.status = 'completed'
      OR upload.kind = 'adapter' AND job.id IS NOT NULL
      OR (
          job.status IN ('failed', 'cancelled')
          AND coalesce(job.completed_at, upload.noted_at) < clock_timestamp() - %(keep_seconds)s * interval '1 second'
      )
  )
ORDER BY upload.noted_at
LIMIT %(limit)s
