-- Announcing: one AFTER trigger on a change of status writes the story, fills the outbox and wakes the daemons,
-- in the transaction of the change, whoever made it.

SET LOCAL lock_timeout = '1s';

-- The status JSON of the app's HTTP contract, with the row's own words beside it.
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
        'error_code', job.error_code,
        'error_message', CASE WHEN job.status = 'cancelled' THEN 'cancelled by request' ELSE job.error_message END,
        'error_hint', job.error_hint
    )
$$;

CREATE OR REPLACE FUNCTION public.training_jobs_announce() RETURNS trigger
LANGUAGE plpgsql
-- The app's cancel has no rights on the story and the outbox: this runs as its owner, training_daemon.
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    old_status text := CASE WHEN TG_OP = 'UPDATE' THEN OLD.status END;
    kind text;
    event text;
    place bigint;
BEGIN
    kind := CASE
        WHEN TG_OP = 'INSERT' THEN 'queued'
        WHEN NEW.status = 'initializing' THEN 'claimed'
        WHEN NEW.status = 'running' THEN 'started'
        WHEN NEW.status <> 'queued' THEN NEW.status
        WHEN old_status IN ('failed', 'cancelled') THEN 'resubmitted'
        WHEN NEW.attempt < OLD.attempt THEN 'released'
        WHEN NEW.error_code = 'worker_lost' THEN 'reaped'
        ELSE 'retrying'
    END;
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    VALUES (
        NEW.id, NEW.lease_epoch, kind,
        CASE WHEN kind IN ('failed', 'retrying', 'reaped') THEN coalesce(NEW.error_message, '') ELSE '' END,
        jsonb_strip_nulls(jsonb_build_object(
            'from', old_status,
            'to', NEW.status,
            'attempt', NEW.attempt,
            'error_code', CASE WHEN kind IN ('failed', 'retrying', 'reaped') THEN NEW.error_code END,
            'run_after', NEW.run_after,
            'cost', NEW.final_cost
        ))
    );

    -- The sender of an insert knows of it; every later change is told.
    IF NEW.callback_url IS NOT NULL AND kind <> 'queued' THEN
        event := 'job.' || CASE
            WHEN kind = 'claimed' THEN 'initializing'
            WHEN kind = 'resubmitted' THEN 'queued'
            WHEN NEW.status = 'queued' THEN 'released'
            ELSE kind
        END;
        -- Taken under the job's row lock: the numbers of one job never change places.
        place := nextval('public.training_callbacks_sequence_seq');
        INSERT INTO public.training_callbacks (sequence, job_id, user_id, url, host, event, payload)
        VALUES (
            place, NEW.id, NEW.user_id, NEW.callback_url,
            lower(coalesce(substring(NEW.callback_url FROM '^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?([^/?#]+)'), '')),
            event,
            public.training_status_json(NEW)
                || jsonb_build_object('job_id', NEW.id, 'event', event, 'sequence', place, 'at', clock_timestamp())
        );
    END IF;

    -- Insert, requeue and cancel only: NOTIFY takes a database-wide lock at commit, so never on progress.
    IF NEW.status IN ('queued', 'cancelled') THEN
        PERFORM pg_notify('training_jobs', NEW.status || ' ' || NEW.id);
    END IF;
    RETURN NULL;
END
$$;

-- Owned by the daemon's role; to own something in a schema a role needs CREATE on it for a moment.
GRANT CREATE ON SCHEMA public TO training_daemon;
ALTER FUNCTION public.training_jobs_announce() OWNER TO training_daemon;
REVOKE CREATE ON SCHEMA public FROM training_daemon;

REVOKE EXECUTE ON FUNCTION public.training_jobs_announce(), public.training_status_json(public.training_jobs)
    FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_status_json(public.training_jobs)
    TO authenticated, service_role, training_daemon;

CREATE OR REPLACE TRIGGER training_jobs_announce_insert
    AFTER INSERT ON public.training_jobs
    FOR EACH ROW EXECUTE FUNCTION public.training_jobs_announce();

CREATE OR REPLACE TRIGGER training_jobs_announce_update
    AFTER UPDATE ON public.training_jobs
    FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION public.training_jobs_announce();
