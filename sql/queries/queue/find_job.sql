-- Reads what really exists of a job, its lease and its stored checkpoints, even if row security hides it. Always one
-- row. `can_tell` false: policies may hide rows from us, and also from the owner of the tables.
SELECT found.can_tell, found.job_exists, found.epoch, found.state, found.dataset_exists, found.holder,
       found.checkpoints, found.tables
FROM training_find_job(%(job_id)s) AS found
