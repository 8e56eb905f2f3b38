-- Holds a job whose claim the database refuses, until the operator releases it, and records who refused what.
-- No row means that it no longer waits: it was claimed, cancelled or held.
WITH aside AS (
    UPDATE training_jobs AS job
    SET held = true,
        due = false
    WHERE job.id = %(job_id)s
      AND job.status = 'queued'
      AND NOT job.held
      AND NOT EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = job.id)
    RETURNING job.id, job.lease_epoch
),
told AS (
    INSERT INTO training_events (job_id, epoch, kind, message)
    SELECT aside.id, aside.lease_epoch, 'set_aside', %(reason)s
    FROM aside
)
SELECT aside.id FROM aside
