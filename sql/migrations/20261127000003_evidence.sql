-- Evidence: whether a row that the daemon does not see is gone, or only hidden from it by row security.
-- A RESTRICTIVE policy without TO binds the daemon's role as well. Nothing is deleted, and no attempt given up, because
-- a row is not seen; only because these functions, which row security cannot filter, say that it is not there.

SET LOCAL lock_timeout = '1s';

-- Policies that can keep rows from the daemon: restrictive ones that bind its role, and, with `policy` null, tables
-- whose row security has no policy that lets it see everything. By the catalogue, which is never filtered.
CREATE OR REPLACE FUNCTION public.training_hiding_policies()
RETURNS TABLE (relation text, policy text, verb text, condition text)
LANGUAGE sql STABLE
SET search_path = ''
AS $$
    WITH guarded AS MATERIALIZED (
        SELECT class.relname
        FROM pg_catalog.pg_class AS class
        WHERE class.relnamespace = pg_catalog.to_regnamespace('public')
          AND class.relrowsecurity
          AND class.relname IN (
              'training_jobs', 'training_leases', 'training_events', 'training_workers', 'training_callbacks',
              'training_uploads', 'training_pods', 'datasets', 'metrics_points'
          )
    ),
    binding AS MATERIALIZED (
        SELECT found.*
        FROM pg_catalog.pg_policies AS found
        JOIN guarded ON guarded.relname = found.tablename
        WHERE found.schemaname = 'public'
          AND EXISTS (
              SELECT
              FROM unnest(found.roles) AS grantee
              WHERE CASE grantee WHEN 'public' THEN true ELSE pg_has_role('training_daemon', grantee, 'MEMBER') END
          )
    )
    SELECT binding.tablename::text, binding.policyname::text, binding.cmd, coalesce(binding.qual, binding.with_check)
    FROM binding
    WHERE binding.permissive = 'RESTRICTIVE'
      AND 'true' <> ANY (ARRAY[coalesce(binding.qual, 'true'), coalesce(binding.with_check, 'true')])
    UNION ALL
    SELECT guarded.relname::text, NULL, 'SELECT', NULL
    FROM guarded
    WHERE NOT EXISTS (
        SELECT
        FROM binding
        WHERE binding.tablename = guarded.relname
          AND binding.permissive = 'PERMISSIVE'
          AND binding.cmd IN ('ALL', 'SELECT')
          AND binding.qual = 'true'
    )
    ORDER BY 1, 2
$$;

-- What there really is of a job, as the owner of this function sees it. Always one row. `can_tell` false: not even he
-- sees every row (FORCE ROW LEVEL SECURITY, and no BYPASSRLS). `holder` is the lease. `tables` changes when the table of
-- jobs is made anew or emptied: a job that is missing then was not deleted as a job.
CREATE OR REPLACE FUNCTION public.training_real_job(wanted uuid)
RETURNS TABLE (
    can_tell boolean, job_exists boolean, epoch bigint, state text, dataset_exists boolean, holder jsonb,
    checkpoints bigint, tables text
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
    RETURN QUERY
    SELECT
        NOT (
            row_security_active('public.training_jobs') OR row_security_active('public.training_leases')
            OR row_security_active('public.training_uploads') OR row_security_active('public.datasets')
        ),
        job.id IS NOT NULL,
        job.lease_epoch,
        job.status::text,
        EXISTS (SELECT FROM public.datasets AS dataset WHERE dataset.id = job.dataset_id),
        (SELECT to_jsonb(lease) FROM public.training_leases AS lease WHERE lease.job_id = wanted),
        (
            SELECT count(*)
            FROM public.training_uploads AS upload
            WHERE upload.job_id = wanted AND upload.kind = 'checkpoint'
        ),
        'public.training_jobs'::regclass::oid || '/' || pg_relation_filenode('public.training_jobs'::regclass)
    FROM (SELECT) AS always
    LEFT JOIN public.training_jobs AS job ON job.id = wanted;
END
$$;

-- The same for the daemon to ask: where no policy can hide a row from it, its own eyes are as good as the owner's.
-- `can_tell` false: then nothing else in the row means anything.
CREATE OR REPLACE FUNCTION public.training_find_job(wanted uuid)
RETURNS TABLE (
    can_tell boolean, job_exists boolean, epoch bigint, state text, dataset_exists boolean, holder jsonb,
    checkpoints bigint, tables text
)
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
BEGIN
    RETURN QUERY SELECT * FROM public.training_real_job(wanted) AS found WHERE found.can_tell;
    IF FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT
        NOT EXISTS (SELECT FROM public.training_hiding_policies()),
        job.id IS NOT NULL,
        job.lease_epoch,
        job.status::text,
        EXISTS (SELECT FROM public.datasets AS dataset WHERE dataset.id = job.dataset_id),
        (SELECT to_jsonb(lease) FROM public.training_leases AS lease WHERE lease.job_id = wanted),
        (
            SELECT count(*)
            FROM public.training_uploads AS upload
            WHERE upload.job_id = wanted AND upload.kind = 'checkpoint'
        ),
        'public.training_jobs'::regclass::oid || '/' || pg_relation_filenode('public.training_jobs'::regclass)
    FROM (SELECT) AS always
    LEFT JOIN public.training_jobs AS job ON job.id = wanted;
END
$$;

-- A few rows of each table that the daemon works from, whoever may see them: it looks each of them up with its own
-- eyes, and one that it does not find is hidden from it. Empty where the owner of this function sees too little itself.
CREATE OR REPLACE FUNCTION public.training_sample_rows(most integer DEFAULT 20)
RETURNS TABLE (relation text, id uuid)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
    IF row_security_active('public.training_jobs') OR row_security_active('public.training_leases')
        OR row_security_active('public.training_workers') OR row_security_active('public.datasets')
        OR row_security_active('public.training_callbacks') OR row_security_active('public.training_uploads')
        OR row_security_active('public.training_pods')
    THEN
        RETURN;
    END IF;
    RETURN QUERY
    WITH held AS MATERIALIZED (
        SELECT lease.job_id FROM public.training_leases AS lease LIMIT most
    ),
    jobs AS MATERIALIZED (
        SELECT due.id
        FROM (
            SELECT job.id
            FROM public.training_jobs AS job
            WHERE job.due
            ORDER BY job.priority DESC, job.queued_at, job.id
            LIMIT most
        ) AS due
        UNION
        SELECT scheduled.id
        FROM (
            SELECT job.id
            FROM public.training_jobs AS job
            WHERE job.run_after IS NOT NULL AND NOT job.due AND NOT job.held
            ORDER BY job.run_after
            LIMIT most
        ) AS scheduled
        UNION
        SELECT held.job_id FROM held
    )
    SELECT 'training_jobs', jobs.id FROM jobs
    UNION ALL
    SELECT 'training_leases', held.job_id FROM held
    UNION ALL
    SELECT DISTINCT 'datasets', job.dataset_id FROM jobs JOIN public.training_jobs AS job ON job.id = jobs.id
    UNION ALL
    (
        SELECT 'training_workers', worker.id
        FROM public.training_workers AS worker
        WHERE worker.last_seen_at > clock_timestamp() - interval '1 hour'
        ORDER BY worker.last_seen_at DESC
        LIMIT most
    )
    UNION ALL
    (
        SELECT 'training_callbacks', callback.id
        FROM public.training_callbacks AS callback
        WHERE callback.state = 'pending'
        LIMIT most
    )
    UNION ALL
    (SELECT 'training_uploads', upload.job_id FROM public.training_uploads AS upload LIMIT most)
    UNION ALL
    (SELECT 'training_pods', pod.id FROM public.training_pods AS pod WHERE pod.ended_at IS NULL LIMIT most);
END
$$;

-- A lease ends together with its job's move. Where row security hides the job's row, the move finds nothing, and the
-- job would say "running" for ever, without a lease that could run out: the whole statement is refused instead.
CREATE OR REPLACE FUNCTION public.training_leases_end_with_a_move() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    unmoved uuid;
BEGIN
    SELECT gone.job_id INTO unmoved
    FROM gone
    LEFT JOIN public.training_jobs AS job ON job.id = gone.job_id
    WHERE job.status IN ('initializing', 'running') AND job.lease_epoch = gone.epoch
       -- Not even we see it, and no lease outlives its job: it was not deleted.
       OR job.id IS NULL AND row_security_active('public.training_jobs')
    LIMIT 1;
    IF unmoved IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PT503',
            MESSAGE = format('the row of job %s is hidden from training_daemon by row security', unmoved),
            HINT = 'let the policy bind the role that it is meant for: ALTER POLICY ... TO authenticated';
    END IF;
    RETURN NULL;
END
$$;

-- Only for the daemon's own statements: an operator, and the cascade from a deleted job, may delete a lease.
DROP TRIGGER IF EXISTS training_leases_end_with_a_move ON public.training_leases;
CREATE TRIGGER training_leases_end_with_a_move
    AFTER DELETE ON public.training_leases
    REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT
    WHEN (current_user = 'training_daemon')
    EXECUTE FUNCTION public.training_leases_end_with_a_move();

REVOKE EXECUTE ON FUNCTION
    public.training_hiding_policies(), public.training_real_job(uuid), public.training_find_job(uuid),
    public.training_sample_rows(integer), public.training_leases_end_with_a_move()
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION
    public.training_hiding_policies(), public.training_real_job(uuid), public.training_find_job(uuid),
    public.training_sample_rows(integer)
TO training_daemon;
