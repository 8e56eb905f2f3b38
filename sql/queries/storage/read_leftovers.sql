-- Reads uploads that are not needed any more, up to a limit: adapters of final jobs that no completed row names (of a
-- job that waits, the next attempt may adopt one), and checkpoints of jobs that are completed, gone, or failed or
-- cancelled long ago. Never of a job with a lease, even one hidden from us.
-- An export is not needed if its delivery is over, or has been claimed anew, and its result does not name it.
-- A job that we cannot see counts as gone only if that is certain and the caller asks for such jobs (`orphans`).
-- `named` is true if the job's row names the adapter, or if a whole export outlives its job, as an adapter does: then only
-- the record is deleted.
SELECT
    upload.job_id,
    upload.epoch,
    upload.kind,
    upload.step,
    upload.objects,
    upload.manifest_sha256,
    coalesce(
        CASE upload.kind
            WHEN 'adapter' THEN
                job.status = 'completed' AND job.adapter_path = upload.bucket || '/' || upload.objects[1]
            WHEN 'checkpoint' THEN false
            ELSE NOT found.job_exists AND upload.manifest_sha256 IS NOT NULL
        END,
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
      OR CASE
          WHEN upload.kind = 'adapter' THEN job.status IN ('completed', 'failed', 'cancelled')
          WHEN upload.kind = 'checkpoint' THEN
              job.status = 'completed'
              OR (
                  job.status IN ('failed', 'cancelled')
                  AND coalesce(job.completed_at, upload.noted_at)
                      < clock_timestamp() - %(keep_seconds)s * interval '1 second'
              )
          ELSE EXISTS (
              SELECT
              FROM training_deliveries AS delivery
              WHERE delivery.job_id = upload.job_id
                AND delivery.kind = upload.kind
                AND (delivery.state IN ('done', 'failed') OR delivery.claims > upload.epoch)
                AND (delivery.result ->> 'claims')::bigint IS DISTINCT FROM upload.epoch
          )
      END
  )
ORDER BY upload.noted_at
LIMIT %(limit)s
