-- Inserts a job for a caller over HTTP, owned by the service's user. A repeated submit is the same job.
-- With hold_seconds no daemon claims it for that long: its host claims it by id; if that dies, any host may.
-- Always one row; submit_training_job() raises PT400 or PT409 if it cannot be a job.
SELECT (
    submit_training_job(
        %(job)s::jsonb || CASE
            WHEN %(hold_seconds)s::float8 IS NULL THEN '{}'
            ELSE jsonb_build_object(
                'run_after', clock_timestamp() + %(hold_seconds)s::float8 * interval '1 second'
            )
        END
    ) ->> 'job_id'
)::uuid AS job_id
