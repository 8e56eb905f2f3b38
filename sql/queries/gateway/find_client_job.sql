-- Finds a job of this user by the id that its caller chose. Always one row. `job_id` is null if there is none;
-- `can_tell` false: row security may hide it from us.
SELECT
    found.id AS job_id,
    found.id IS NOT NULL OR NOT EXISTS (SELECT FROM training_hiding_policies()) AS can_tell
FROM (SELECT) AS always
LEFT JOIN training_jobs AS found ON found.user_id = %(user_id)s AND found.client_job_id = %(client_job_id)s
