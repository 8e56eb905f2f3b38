-- Adds to a job's story that a submit asked for something else than its row says, once for each thing that was asked.
-- No row means that the story has it already, or that there is no such job.
INSERT INTO training_events (job_id, epoch, kind, message)
SELECT job.id, job.lease_epoch, 'submit_differs', %(message)s
FROM training_jobs AS job
WHERE job.id = %(job_id)s
  AND NOT EXISTS (
      SELECT FROM training_events AS event
      WHERE event.job_id = job.id AND event.kind = 'submit_differs' AND event.message = %(message)s
  )
RETURNING id
