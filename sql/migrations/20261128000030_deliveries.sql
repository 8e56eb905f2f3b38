-- Deliveries: what happens to an adapter after its job is completed. Exports of it, a push to the hub, an endpoint that
-- answers with it. A delivery never fails a training and never opens a job again: what went wrong is in its own row.

SET LOCAL lock_timeout = '1s';

-- The rows are made in the transaction that completes the job. Any host that can do the kind claims one: `lock_token`
-- names the claim, and after `locked_until` another host may take it. `claims` counts the claims that were lost, not
-- given back, and is part of the names of what is stored: a stale host overwrites nothing. `first_worker` is the host
-- that trained the adapter: it may begin before `next_at`. `storage` says where the adapter is, as in training_uploads.
CREATE TABLE IF NOT EXISTS public.training_deliveries (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id uuid NOT NULL REFERENCES public.training_jobs (id) ON DELETE CASCADE,
    user_id uuid NOT NULL,
    kind text NOT NULL,
    target text NOT NULL DEFAULT '',
    state text NOT NULL DEFAULT 'waiting',
    storage text,
    first_worker uuid,
    worker_id uuid,
    attempts integer NOT NULL DEFAULT 0,
    claims bigint NOT NULL DEFAULT 1,
    next_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lock_token uuid,
    locked_until timestamptz,
    result jsonb,
    error_code text,
    error_message text,
    error_hint text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,
    finished_at timestamptz,
    CONSTRAINT training_deliveries_once UNIQUE (job_id, kind, target),
    CONSTRAINT training_deliveries_kind_known CHECK (kind IN ('merged', 'gguf', 'transformers4', 'hub', 'endpoint')),
    CONSTRAINT training_deliveries_state_known CHECK (state IN ('waiting', 'running', 'done', 'failed')),
    CONSTRAINT training_deliveries_locked_while_running CHECK (state <> 'running' OR lock_token IS NOT NULL)
) WITH (fillfactor = 70);

-- Open deliveries only: the claim never reads history.
CREATE INDEX IF NOT EXISTS training_deliveries_open
    ON public.training_deliveries (next_at)
    WHERE state IN ('waiting', 'running');

REVOKE ALL ON public.training_deliveries FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT (
    id, job_id, user_id, kind, target, state, attempts, next_at, locked_until, result, error_code, error_message,
    error_hint, created_at, started_at, finished_at
) ON public.training_deliveries TO authenticated;
GRANT SELECT ON public.training_deliveries TO service_role;
GRANT SELECT, INSERT, UPDATE ON public.training_deliveries TO training_daemon;

ALTER TABLE public.training_deliveries ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS trainer_authenticated_select ON public.training_deliveries;
CREATE POLICY trainer_authenticated_select ON public.training_deliveries FOR SELECT TO authenticated
    USING ((SELECT auth.uid()) = user_id);
DROP POLICY IF EXISTS trainer_training_daemon_all ON public.training_deliveries;
CREATE POLICY trainer_training_daemon_all ON public.training_deliveries FOR ALL TO training_daemon
    USING (true) WITH CHECK (true);

-- Exports are uploads too. `epoch` is then the delivery's `claims`, and `manifest_sha256` stands once it is whole.
ALTER TABLE public.training_uploads DROP CONSTRAINT IF EXISTS training_uploads_kind_known;
ALTER TABLE public.training_uploads ADD CONSTRAINT training_uploads_kind_known
    CHECK (kind IN ('adapter', 'checkpoint', 'merged', 'gguf', 'transformers4')) NOT VALID;
ALTER TABLE public.training_uploads VALIDATE CONSTRAINT training_uploads_kind_known;

-- Called by the statement that completes a job: `wanted` is a list of {kind, target}. Returns how many rows it made.
-- A fault becomes a line in the job's story, never the end of a training.
CREATE OR REPLACE FUNCTION public.training_make_deliveries(job uuid, owner_id uuid, job_epoch bigint, worker uuid, wanted jsonb)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = ''
SET lock_timeout = '2s'
AS $$
DECLARE
    made integer;
BEGIN
    IF wanted IS NULL OR jsonb_array_length(wanted) = 0 THEN
        RETURN 0;
    END IF;
    INSERT INTO public.training_deliveries AS delivery (job_id, user_id, kind, target, storage, first_worker, next_at)
    SELECT
        job,
        owner_id,
        line.kind,
        coalesce(line.target, ''),
        (
            SELECT upload.storage
            FROM public.training_uploads AS upload
            WHERE upload.job_id = job AND upload.epoch = job_epoch AND upload.kind = 'adapter'
        ),
        worker,
        -- The host that trained has the base model in place; others wait for it this long.
        clock_timestamp() + interval '30 seconds'
    FROM jsonb_to_recordset(wanted) AS line (kind text, target text)
    -- Only after a restore from a backup: the job was completed before. Its new adapter is delivered anew.
    ON CONFLICT (job_id, kind, target) DO UPDATE
    SET state = 'waiting',
        storage = excluded.storage,
        first_worker = excluded.first_worker,
        attempts = 0,
        claims = delivery.claims + 1,
        next_at = excluded.next_at,
        lock_token = NULL,
        locked_until = NULL,
        error_code = NULL,
        error_message = NULL,
        error_hint = NULL,
        finished_at = NULL;
    GET DIAGNOSTICS made = ROW_COUNT;
    RETURN made;
EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    VALUES (job, job_epoch, 'notice',
        format('What follows the training could not be written down: %s. Ask for it with redeliver().', rtrim(SQLERRM, '.')),
        jsonb_build_object('code', 'side_table_failed', 'table', 'training_deliveries', 'sqlstate', SQLSTATE));
    RETURN 0;
END
$$;

-- The deliveries of a job as its owner sees them. A lock that has run out is no work: any host may take it now.
CREATE OR REPLACE FUNCTION public.training_deliveries_of(job uuid) RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = ''
AS $$
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'id', delivery.id,
        'kind', delivery.kind,
        'target', delivery.target,
        'state', CASE
            WHEN delivery.state = 'running' AND delivery.locked_until < clock_timestamp() THEN 'waiting'
            ELSE delivery.state
        END,
        'attempts', delivery.attempts,
        'next_at', CASE WHEN delivery.state = 'waiting' THEN delivery.next_at END,
        -- Not the list of files, which may be long: it is in the row, and in the stored manifest.
        'result', delivery.result - 'files',
        'error_code', delivery.error_code,
        'error_message', delivery.error_message,
        'error_hint', delivery.error_hint,
        'started_at', delivery.started_at,
        'finished_at', delivery.finished_at
    ) ORDER BY delivery.created_at, delivery.kind, delivery.target), '[]')
    FROM public.training_deliveries AS delivery
    WHERE delivery.job_id = job
$$;

-- The status JSON of 20261128000004 again; what is new are the deliveries of a completed job.
CREATE OR REPLACE FUNCTION public.training_status_json(job public.training_jobs) RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = ''
AS $$
    SELECT jsonb_build_object(
        'status', CASE job.status
            WHEN 'completed' THEN 'completed'
            WHEN 'failed' THEN 'failed'
            WHEN 'cancelled' THEN 'failed'
            ELSE 'running'
        END,
        'state', job.status,
        'progress', coalesce(job.progress, 0),
        'current_epoch', coalesce(job.current_epoch, 0),
        'current_step', coalesce(job.current_step, 0),
        'total_steps', job.total_steps,
        'stage', job.current_stage,
        'metrics', coalesce(job.current_metrics, '{}'),
        'attempt', job.attempt,
        'cost', coalesce(job.final_cost, job.current_cost),
        'adapter_path', job.adapter_path,
        'adapter_sha256', job.adapter_sha256,
        'adapter_bytes', job.adapter_bytes,
        'deliveries', CASE WHEN job.status = 'completed' THEN public.training_deliveries_of(job.id) ELSE '[]' END,
        'error_code', job.error_code,
        'error_message', CASE WHEN job.status = 'cancelled' THEN 'Cancelled by request.' ELSE job.error_message END,
        'error_hint', job.error_hint
    )
$$;

-- What a delivery tells: a line in the job's story, a callback when it has ended, and a wake-up when it can be taken.
CREATE OR REPLACE FUNCTION public.training_deliveries_announce() RETURNS trigger
LANGUAGE plpgsql
-- redeliver() may be called by the job's owner, who has no rights on the story and the outbox.
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    job public.training_jobs;
    event text;
    place bigint;
    named text := concat_ws(' ', NEW.kind, nullif(NEW.target, ''));
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.state = OLD.state AND NEW.lock_token IS NOT DISTINCT FROM OLD.lock_token THEN
            RETURN NULL;
        END IF;
    END IF;
    IF NEW.state = 'waiting' THEN
        PERFORM pg_notify('training_jobs', 'delivery');
    END IF;
    SELECT * INTO job FROM public.training_jobs AS found WHERE found.id = NEW.job_id;
    IF job.id IS NULL THEN
        RETURN NULL;
    END IF;
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    VALUES (
        NEW.job_id, job.lease_epoch, 'delivery',
        CASE
            WHEN NEW.state = 'running' THEN format('Delivery %s: a host has begun (try %s).', named, NEW.attempts)
            WHEN NEW.state = 'done' THEN format('Delivery %s: done.', named)
            WHEN NEW.state = 'failed' THEN format('Delivery %s failed: %s', named, NEW.error_message)
            WHEN TG_OP = 'INSERT' OR NEW.error_message IS NULL THEN format('Delivery %s: waits for a host.', named)
            ELSE format('Delivery %s is tried again: %s', named, NEW.error_message)
        END,
        jsonb_strip_nulls(jsonb_build_object(
            'delivery_id', NEW.id,
            'delivery', NEW.kind,
            'target', nullif(NEW.target, ''),
            'state', NEW.state,
            'attempts', NEW.attempts,
            'error_code', CASE WHEN NEW.state IN ('waiting', 'failed') THEN NEW.error_code END
        ))
    );
    IF job.callback_url IS NOT NULL AND NEW.state IN ('done', 'failed') THEN
        event := CASE NEW.state WHEN 'done' THEN 'job.delivered' ELSE 'job.delivery_failed' END;
        place := nextval('public.training_callbacks_sequence_seq');
        INSERT INTO public.training_callbacks (sequence, job_id, user_id, url, host, event, payload)
        VALUES (
            place, job.id, job.user_id, job.callback_url,
            left(lower(coalesce(substring(job.callback_url FROM '^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?([^/?#]+)'), '')), 260),
            event,
            public.training_status_json(job) || jsonb_build_object(
                'job_id', job.id, 'event', event, 'sequence', place, 'at', clock_timestamp(), 'delivery', NEW.id)
        );
    END IF;
    RETURN NULL;
END
$$;

-- Does a delivery of a completed job again, or one that it did not ask for, by its owner or the operator. Where the job
-- has one delivery of the kind its target need not be named. Returns the job's status JSON.
CREATE OR REPLACE FUNCTION public.redeliver(job_id uuid, kind text, target text DEFAULT NULL) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
#variable_conflict use_column
DECLARE
    job public.training_jobs;
    delivery public.training_deliveries;
    others integer;
BEGIN
    SELECT * INTO job FROM public.training_jobs AS found WHERE found.id = redeliver.job_id FOR KEY SHARE;
    PERFORM public.training_require_owner(job.user_id);
    IF job.id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'no such job of yours';
    END IF;
    IF job.status <> 'completed' OR job.adapter_path IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = format('the job is %s', job.status),
            HINT = 'only the adapter of a completed job can be delivered';
    END IF;
    SELECT count(*) INTO others
    FROM public.training_deliveries AS known
    WHERE known.job_id = redeliver.job_id AND known.kind = redeliver.kind
      AND (redeliver.target IS NULL OR known.target = redeliver.target);
    IF others > 1 THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = format('the job has %s deliveries of this kind', others),
            HINT = 'name the target as well';
    END IF;
    SELECT * INTO delivery
    FROM public.training_deliveries AS known
    WHERE known.job_id = redeliver.job_id AND known.kind = redeliver.kind
      AND (redeliver.target IS NULL OR known.target = redeliver.target)
    FOR UPDATE;
    IF delivery.id IS NULL THEN
        IF redeliver.kind IS NULL OR redeliver.kind NOT IN ('merged', 'gguf', 'transformers4') THEN
            RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'the job has no such delivery',
                HINT = 'one of merged, gguf, transformers4 can be asked for after the training as well';
        END IF;
        IF coalesce(redeliver.target, '') <> '' THEN
            RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'the job has no such delivery',
                HINT = 'an export has no target: leave it out';
        END IF;
        INSERT INTO public.training_deliveries (job_id, user_id, kind, storage)
        VALUES (
            job.id,
            job.user_id,
            redeliver.kind,
            -- Where its adapter is, as far as another delivery of the job knows it; else any host tries.
            (
                SELECT sibling.storage
                FROM public.training_deliveries AS sibling
                WHERE sibling.job_id = job.id AND sibling.storage IS NOT NULL
                LIMIT 1
            )
        )
        ON CONFLICT DO NOTHING;
    ELSIF delivery.state IN ('done', 'failed') THEN
        UPDATE public.training_deliveries AS again
        SET state = 'waiting',
            attempts = 0,
            -- What an earlier one has stored is served until the new one is whole: other names.
            claims = again.claims + 1,
            next_at = clock_timestamp(),
            first_worker = NULL,
            error_code = NULL,
            error_message = NULL,
            error_hint = NULL,
            started_at = NULL,
            finished_at = NULL
        WHERE again.id = delivery.id;
    ELSIF delivery.state = 'waiting' THEN
        -- It waits already: now instead of later.
        UPDATE public.training_deliveries AS again SET next_at = clock_timestamp(), attempts = 0
        WHERE again.id = delivery.id;
        PERFORM pg_notify('training_jobs', 'delivery');
    ELSIF delivery.locked_until > clock_timestamp() THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = 'a host works on this delivery now',
            HINT = 'wait for its end';
    END IF;
    RETURN public.training_status_json(job) || jsonb_build_object('job_id', job.id);
END
$$;

-- Owned by the daemon's role; to own something in a schema a role needs CREATE on it for a moment.
GRANT CREATE ON SCHEMA public TO training_daemon;
ALTER FUNCTION public.training_deliveries_announce() OWNER TO training_daemon;
ALTER FUNCTION public.redeliver(uuid, text, text) OWNER TO training_daemon;
REVOKE CREATE ON SCHEMA public FROM training_daemon;

REVOKE EXECUTE ON FUNCTION
    public.training_make_deliveries(uuid, uuid, bigint, uuid, jsonb), public.training_deliveries_of(uuid),
    public.training_deliveries_announce(), public.redeliver(uuid, text, text)
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_make_deliveries(uuid, uuid, bigint, uuid, jsonb) TO training_daemon;
GRANT EXECUTE ON FUNCTION public.training_deliveries_of(uuid), public.redeliver(uuid, text, text)
TO authenticated, service_role, training_daemon;

CREATE OR REPLACE TRIGGER training_deliveries_announce
    AFTER INSERT OR UPDATE OF state, lock_token ON public.training_deliveries
    FOR EACH ROW EXECUTE FUNCTION public.training_deliveries_announce();

-- Two functions of 20261127000003 again, whole; what is new is this table among those that must not be hidden from us.
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
              'training_uploads', 'training_pods', 'training_deliveries', 'datasets', 'metrics_points'
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

CREATE OR REPLACE FUNCTION public.training_sample_rows(most integer DEFAULT 20)
RETURNS TABLE (relation text, id uuid)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
    IF row_security_active('public.training_jobs') OR row_security_active('public.training_leases')
        OR row_security_active('public.training_workers') OR row_security_active('public.datasets')
        OR row_security_active('public.training_callbacks') OR row_security_active('public.training_uploads')
        OR row_security_active('public.training_pods') OR row_security_active('public.training_deliveries')
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
    (SELECT 'training_pods', pod.id FROM public.training_pods AS pod WHERE pod.ended_at IS NULL LIMIT most)
    UNION ALL
    (
        SELECT 'training_deliveries', delivery.id
        FROM public.training_deliveries AS delivery
        WHERE delivery.state IN ('waiting', 'running')
        LIMIT most
    );
END
$$;

-- The app may subscribe to its deliveries, as to its jobs.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_publication WHERE pubname = 'supabase_realtime' AND NOT puballtables)
        AND NOT EXISTS (
            SELECT FROM pg_publication_tables
            WHERE pubname = 'supabase_realtime' AND schemaname = 'public' AND tablename = 'training_deliveries'
        )
    THEN
        ALTER PUBLICATION supabase_realtime ADD TABLE public.training_deliveries;
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'cannot add training_deliveries to supabase_realtime: its owner must';
END
$$;
