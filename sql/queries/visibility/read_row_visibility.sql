-- Reads whether we see all rows: for each table, how many of a few sample rows are hidden from us.
-- Always one row. `can_tell` false: no role that we can use sees past row security.
SELECT
    found.can_tell,
    found.tables,
    coalesce((
        SELECT jsonb_object_agg(hidden.relation, hidden.rows)
        FROM (
            SELECT sample.relation, count(*) AS rows
            FROM training_sample_rows() AS sample
            WHERE NOT CASE sample.relation
                WHEN 'training_jobs' THEN EXISTS (SELECT FROM training_jobs AS job WHERE job.id = sample.id)
                WHEN 'training_leases' THEN EXISTS (SELECT FROM training_leases AS lease WHERE lease.job_id = sample.id)
                WHEN 'training_workers' THEN EXISTS (SELECT FROM training_workers AS worker WHERE worker.id = sample.id)
                WHEN 'training_callbacks'
                    THEN EXISTS (SELECT FROM training_callbacks AS callback WHERE callback.id = sample.id)
                WHEN 'training_uploads'
                    THEN EXISTS (SELECT FROM training_uploads AS upload WHERE upload.job_id = sample.id)
                WHEN 'training_deliveries'
                    THEN EXISTS (SELECT FROM training_deliveries AS delivery WHERE delivery.id = sample.id)
                WHEN 'training_pods' THEN EXISTS (SELECT FROM training_pods AS pod WHERE pod.id = sample.id)
                WHEN 'datasets' THEN EXISTS (SELECT FROM datasets AS dataset WHERE dataset.id = sample.id)
            END
            GROUP BY sample.relation
        ) AS hidden
    ), '{}') AS hidden
FROM training_find_job(NULL) AS found
