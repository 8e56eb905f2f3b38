-- Who may see and write what: the daemon's own role, explicit grants for the API roles, row level security.
-- Explicit both ways: new Supabase projects grant nothing on new tables, older ones grant everything to everyone.

SET LOCAL lock_timeout = '1s';

-- The daemon is a role of its own, so that Postgres knows who moves a job by current_user. Without a login until
-- the operator gives it one:  ALTER ROLE training_daemon LOGIN PASSWORD '...';
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'training_daemon') THEN
        BEGIN
            CREATE ROLE training_daemon NOLOGIN NOBYPASSRLS;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;  -- another database of this cluster was a moment ahead
        END;
    END IF;
    -- The migrating user gives it functions to own, and may SET ROLE to it.
    IF NOT pg_has_role(current_user, 'training_daemon', 'USAGE') THEN
        EXECUTE format('GRANT training_daemon TO %I', current_user);
    END IF;
END
$$;

GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role, training_daemon;

-- anon sees and does nothing here.
REVOKE ALL ON
    public.training_jobs, public.datasets, public.metrics_points, public.model_artifacts, public.cost_records,
    public.notifications, public.training_leases, public.training_events, public.training_workers,
    public.training_callbacks
FROM anon, PUBLIC;

-- Users: the app's inserts stay as they are (the guard resets what is not theirs to set); of updates only the cancel.
REVOKE UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER ON public.training_jobs FROM authenticated;
GRANT SELECT, INSERT ON public.training_jobs TO authenticated;
GRANT UPDATE (status, completed_at, final_cost) ON public.training_jobs TO authenticated;

REVOKE TRUNCATE, REFERENCES, TRIGGER ON public.datasets FROM authenticated;
GRANT SELECT, INSERT, UPDATE, DELETE ON public.datasets TO authenticated;

REVOKE ALL ON
    public.metrics_points, public.cost_records, public.training_leases, public.training_events,
    public.training_workers, public.training_callbacks
FROM authenticated;
GRANT SELECT ON public.metrics_points, public.cost_records, public.training_events TO authenticated;
GRANT SELECT (job_id, user_id, claimed_at, heartbeat_at, expires_at) ON public.training_leases TO authenticated;
-- What a waiting job waits for; never which host.
GRANT SELECT (id, device, gpu_count, gpu_memory_gb, gpu_type, models, slots, user_cap, busy, state, last_seen_at)
    ON public.training_workers TO authenticated;
GRANT SELECT (id, sequence, job_id, user_id, event, state, attempts, created_at, next_at, last_status, delivered_at)
    ON public.training_callbacks TO authenticated;

-- Artifacts a user may rename or retire, notifications mark as read and delete; the service makes them. Never the
-- paths in `artifacts`: the app signs whatever stands there, and a path of somebody else's adapter could stand there.
REVOKE INSERT, UPDATE, TRUNCATE, REFERENCES, TRIGGER ON public.model_artifacts, public.notifications FROM authenticated;
GRANT SELECT, DELETE ON public.model_artifacts, public.notifications TO authenticated;
GRANT UPDATE (name, version, description, status, deployed_at, updated_at, deleted_at)
    ON public.model_artifacts TO authenticated;
GRANT UPDATE (read) ON public.notifications TO authenticated;

GRANT SELECT, INSERT, UPDATE, DELETE ON
    public.training_jobs, public.datasets, public.metrics_points, public.model_artifacts, public.cost_records,
    public.notifications
TO service_role;
-- The app's server reads our tables; it writes them through functions only.
REVOKE ALL ON
    public.training_leases, public.training_events, public.training_workers, public.training_callbacks
FROM service_role;
GRANT SELECT ON
    public.training_leases, public.training_events, public.training_workers, public.training_callbacks
TO service_role;

-- The daemon: what its statements need. It inserts jobs and datasets for callers of the older HTTP contract.
-- Of a job it writes how it goes, never whose it is, what it asks for or its limits: its password lies on rented hosts.
GRANT SELECT, INSERT ON public.training_jobs TO training_daemon;
GRANT UPDATE (
    status, current_stage, progress, current_epoch, total_epochs, current_step, total_steps, current_metrics,
    queued_at, started_at, completed_at, estimated_completion_at, current_cost, estimated_total_cost, final_cost,
    error_message, error_stack, error_code, error_hint, retry_count, attempt, lease_epoch, last_progress_at,
    run_after, due, held, need_gpus, need_gpu_memory_gb, need_gpu_type, base_model, callback_url,
    adapter_path, adapter_sha256, adapter_bytes, result
) ON public.training_jobs TO training_daemon;
GRANT SELECT, INSERT ON public.datasets, public.notifications, public.model_artifacts, public.cost_records
    TO training_daemon;
GRANT UPDATE (name, quality_metrics, training_summary, configuration, artifacts, updated_at)
    ON public.model_artifacts TO training_daemon;
GRANT UPDATE (amount, details) ON public.cost_records TO training_daemon;
GRANT SELECT, INSERT, UPDATE ON public.training_workers TO training_daemon;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    public.metrics_points, public.training_leases, public.training_callbacks
TO training_daemon;
GRANT SELECT, INSERT, DELETE ON public.training_events TO training_daemon;
-- The numbers of events and callbacks: older projects let every API role draw and even set them.
REVOKE ALL ON SEQUENCE public.training_events_id_seq, public.training_callbacks_sequence_seq
    FROM PUBLIC, anon, authenticated, service_role;
GRANT USAGE ON SEQUENCE public.training_callbacks_sequence_seq TO training_daemon;
-- `doctor` compares what is applied here with what its own version brings. Absent where a file was run by hand.
DO $$
BEGIN
    IF to_regclass('supabase_migrations.schema_migrations') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA supabase_migrations TO training_daemon;
        GRANT SELECT (version) ON supabase_migrations.schema_migrations TO training_daemon;
    END IF;
END
$$;

ALTER TABLE public.training_jobs ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.datasets ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.metrics_points ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.model_artifacts ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.cost_records ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.notifications ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_leases ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_events ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_workers ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_callbacks ENABLE ROW LEVEL SECURITY;

-- One policy a line: table, verb, who, which rows, which new rows. Made anew at each run, so that a later edition
-- of this file is the whole truth; the app's own policies stay beside ours.
DO $$
DECLARE
    own constant text := '(SELECT auth.uid()) = user_id';
    of_own_job constant text :=
        'EXISTS (SELECT FROM public.training_jobs AS job WHERE job.id = job_id AND job.user_id = (SELECT auth.uid()))';
    rule record;
BEGIN
    FOR rule IN
        SELECT * FROM (VALUES
            ('training_jobs', 'SELECT', 'authenticated', own, NULL),
            ('training_jobs', 'INSERT', 'authenticated', NULL, own),
            ('training_jobs', 'UPDATE', 'authenticated', own, own || ' AND status = ''cancelled'''),
            ('datasets', 'SELECT', 'authenticated', own, NULL),
            ('datasets', 'INSERT', 'authenticated', NULL, own),
            ('datasets', 'UPDATE', 'authenticated', own, own),
            ('datasets', 'DELETE', 'authenticated', own, NULL),
            ('metrics_points', 'SELECT', 'authenticated', of_own_job, NULL),
            ('training_events', 'SELECT', 'authenticated', of_own_job, NULL),
            ('model_artifacts', 'SELECT', 'authenticated', own, NULL),
            ('model_artifacts', 'UPDATE', 'authenticated', own, own),
            ('model_artifacts', 'DELETE', 'authenticated', own, NULL),
            ('cost_records', 'SELECT', 'authenticated', own, NULL),
            ('notifications', 'SELECT', 'authenticated', own, NULL),
            ('notifications', 'UPDATE', 'authenticated', own, own),
            ('notifications', 'DELETE', 'authenticated', own, NULL),
            ('training_leases', 'SELECT', 'authenticated', own, NULL),
            ('training_workers', 'SELECT', 'authenticated', 'true', NULL),
            ('training_callbacks', 'SELECT', 'authenticated', own, NULL),
            ('training_jobs', 'ALL', 'training_daemon', 'true', 'true'),
            ('datasets', 'ALL', 'training_daemon', 'true', 'true'),
            ('metrics_points', 'ALL', 'training_daemon', 'true', 'true'),
            ('model_artifacts', 'ALL', 'training_daemon', 'true', 'true'),
            ('cost_records', 'ALL', 'training_daemon', 'true', 'true'),
            ('notifications', 'ALL', 'training_daemon', 'true', 'true'),
            ('training_leases', 'ALL', 'training_daemon', 'true', 'true'),
            ('training_events', 'ALL', 'training_daemon', 'true', 'true'),
            ('training_workers', 'ALL', 'training_daemon', 'true', 'true'),
            ('training_callbacks', 'ALL', 'training_daemon', 'true', 'true')
        ) AS rules (relation, verb, grantee, visible, admitted)
    LOOP
        EXECUTE format('DROP POLICY IF EXISTS %I ON public.%I',
            'trainer_' || rule.grantee || '_' || lower(rule.verb), rule.relation);
        EXECUTE format('CREATE POLICY %I ON public.%I FOR %s TO %I %s %s',
            'trainer_' || rule.grantee || '_' || lower(rule.verb), rule.relation, rule.verb, rule.grantee,
            'USING (' || rule.visible || ')', 'WITH CHECK (' || rule.admitted || ')');
    END LOOP;
END
$$;
