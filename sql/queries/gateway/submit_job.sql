-- A caller over HTTP has no row: one is inserted, owned by the service's user. A repeated submit is the same job.
-- With hold_seconds no daemon takes it so long: its host claims it by id, and if that dies first, anybody may.
-- Always one row; submit_training_job() raises PT400 or PT409 for what cannot be a job.
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
