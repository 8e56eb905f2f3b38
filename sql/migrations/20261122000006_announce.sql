-- Announcing: one AFTER trigger on a change of status writes the story, fills the outbox and wakes the daemons,
-- in the transaction of the change, whoever made it. Two more wake them for what makes a waiting job claimable
-- without a change of its status: an edit of the row, and the end of a lease that stood in its way.
--
-- Those on updates name their columns (`UPDATE OF`), and one has no WHEN: the columns of a statement are compared bit by
-- bit, a WHEN is parsed from text in every statement, which was a fifth of a claim.

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
    kind text;
    words text;
    old_status text;
    event text;
    place bigint;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.status = OLD.status THEN
            RETURN NULL;
        END IF;
        old_status := OLD.status;
    END IF;

    -- One branch a kind, and the claim's near the top: only what is reached is set up by Postgres.
    IF TG_OP = 'INSERT' THEN
        kind := 'queued';
        words := CASE
            WHEN NEW.run_after > clock_timestamp()
            THEN to_char(NEW.run_after AT TIME ZONE 'UTC', '"Scheduled for "YYYY-MM-DD HH24:MI" UTC."')
            ELSE 'Waits for a host.'
        END;
    ELSIF NEW.status = 'initializing' THEN
        kind := 'claimed';
        words := format('A host has claimed the job (attempt %s of %s).', NEW.attempt, NEW.max_attempts);
    ELSIF NEW.status = 'running' THEN
        kind := 'started';
        words := 'Training has begun: the first step is done.';
    ELSIF NEW.status = 'completed' THEN
        kind := NEW.status;
        words := 'Completed: the adapter is stored and verified.';
    ELSIF NEW.status = 'cancelled' THEN
        kind := NEW.status;
        words := 'Cancelled by request.';
    ELSIF NEW.status = 'queued' AND old_status IN ('failed', 'cancelled') THEN
        kind := 'resubmitted';
        words := 'Submitted again, with all its attempts.';
    ELSIF NEW.status = 'queued' AND NEW.attempt < OLD.attempt THEN
        kind := 'released';
        words := 'Back in the queue unharmed: this attempt does not count.';
    ELSE
        -- What went wrong, in its own words.
        kind := CASE
            WHEN NEW.status <> 'queued' THEN NEW.status
            WHEN NEW.error_code = 'worker_lost' THEN 'reaped'
            ELSE 'retrying'
        END;
        words := coalesce(NEW.error_message, '');
    END IF;
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    VALUES (
        NEW.id, NEW.lease_epoch, kind, words,
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
            -- No name of the internet is longer, and an index has no room for all that a user may write there.
            left(lower(coalesce(substring(NEW.callback_url FROM '^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?([^/?#]+)'), '')), 260),
            event,
            public.training_status_json(NEW)
                || jsonb_build_object('job_id', NEW.id, 'event', event, 'sequence', place, 'at', clock_timestamp())
        );
    END IF;

    -- Insert, requeue and cancel only: NOTIFY takes a database-wide lock at commit, so never on progress.
    IF NEW.status IN ('queued', 'cancelled') THEN
        PERFORM pg_notify('training_jobs', NEW.status || ' ' || NEW.id);
    END IF;

    -- The app's own tables. Nothing of an older dispatcher's rows (epoch 0).
    IF NEW.lease_epoch > 0 THEN
        IF kind IN ('completed', 'failed', 'cancelled') THEN
            PERFORM public.training_record_cost(NEW, NEW.final_cost);
            PERFORM public.training_notify_user(NEW, kind);
        ELSIF kind = 'started' AND NEW.attempt = 1 THEN
            PERFORM public.training_notify_user(NEW, kind);
        END IF;
    END IF;
    RETURN NULL;
END
$$;

-- A queued job was edited, or its time has come: a daemon that could not take it before may take it now, and one that
-- sleeps until its old time must set its clock anew. Without an id: a statement that edits a thousand rows is one wake-up.
CREATE OR REPLACE FUNCTION public.training_jobs_wake() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
    PERFORM pg_notify('training_jobs', 'queued');
    RETURN NULL;
END
$$;

-- A lease has ended. It may have kept its own job waiting (cancelled and submitted again while its child was ending),
-- or other jobs of a user at his cap: who waits is told, and nobody where nobody waits.
CREATE OR REPLACE FUNCTION public.training_leases_wake() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
    IF EXISTS (SELECT FROM public.training_jobs AS job WHERE job.id = OLD.job_id AND job.status = 'queued') THEN
        -- A requeue has said the same in this transaction: equal words are delivered once, and wake everybody.
        PERFORM pg_notify('training_jobs', 'queued ' || OLD.job_id);
    ELSIF OLD.user_slot IS NOT NULL
        AND EXISTS (SELECT FROM public.training_jobs AS waiting WHERE waiting.user_id = OLD.user_id AND waiting.due)
    THEN
        PERFORM pg_notify('training_jobs', 'queued');
    END IF;
    RETURN NULL;
END
$$;

-- Owned by the daemon's role; to own something in a schema a role needs CREATE on it for a moment.
GRANT CREATE ON SCHEMA public TO training_daemon;
ALTER FUNCTION public.training_jobs_announce() OWNER TO training_daemon;
REVOKE CREATE ON SCHEMA public FROM training_daemon;

REVOKE EXECUTE ON FUNCTION
    public.training_jobs_announce(), public.training_jobs_wake(), public.training_leases_wake(),
    public.training_status_json(public.training_jobs)
    FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_status_json(public.training_jobs)
    TO authenticated, service_role, training_daemon;

CREATE OR REPLACE TRIGGER training_jobs_announce_insert
    AFTER INSERT ON public.training_jobs
    FOR EACH ROW EXECUTE FUNCTION public.training_jobs_announce();

CREATE OR REPLACE TRIGGER training_jobs_announce_update
    AFTER UPDATE OF status ON public.training_jobs
    FOR EACH ROW EXECUTE FUNCTION public.training_jobs_announce();

CREATE OR REPLACE TRIGGER training_jobs_wake
    AFTER UPDATE OF due, held, run_after, priority, gpu_config, hyperparameters ON public.training_jobs
    FOR EACH ROW
    WHEN (
        NEW.status = 'queued' AND OLD.status = 'queued' AND NOT NEW.held
        AND (
            (NEW.due AND NOT OLD.due)
            -- Sooner than before. Later wakes nobody: a daemon finds out when it looks at the old time.
            OR coalesce(NEW.run_after, '-infinity') < coalesce(OLD.run_after, '-infinity')
            OR NEW.priority > OLD.priority
            OR (NEW.need_gpus, NEW.need_gpu_memory_gb, NEW.need_gpu_type, NEW.base_model)
                IS DISTINCT FROM (OLD.need_gpus, OLD.need_gpu_memory_gb, OLD.need_gpu_type, OLD.base_model)
        )
    )
    EXECUTE FUNCTION public.training_jobs_wake();

CREATE OR REPLACE TRIGGER training_leases_wake
    AFTER DELETE ON public.training_leases
    FOR EACH ROW EXECUTE FUNCTION public.training_leases_wake();
