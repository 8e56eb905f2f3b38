-- Functions for the app (PostgREST: rpc), the operator and pg_cron. Those that move jobs for others are SECURITY
-- DEFINER, owned by training_daemon, with an empty search_path and their own check of the caller.

SET LOCAL lock_timeout = '1s';

-- Who called, seen from inside a SECURITY DEFINER function, where current_user is the owner: the role that
-- PostgREST set for the request, else the login. Raises unless he is the job's owner, the app's server or the operator.
CREATE OR REPLACE FUNCTION public.training_require_owner(owner_id uuid) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
    caller text := coalesce(nullif(current_setting('role', true), 'none'), session_user);
    -- As auth.uid() reads it, without needing the auth schema.
    caller_id text := coalesce(
        nullif(current_setting('request.jwt.claim.sub', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
    );
BEGIN
    IF caller = 'service_role' OR pg_has_role(caller, 'training_daemon', 'MEMBER') THEN
        RETURN;
    END IF;
    IF caller = 'authenticated' AND owner_id IS NOT NULL AND caller_id = owner_id::text THEN
        RETURN;
    END IF;
    -- The same words as for a job that does not exist: a stranger learns nothing.
    RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'no such job of yours';
END
$$;

-- Ends leases that expired: their jobs go back to the queue, or to failed when no attempt is left.
-- Safe to call by anybody at any time; an empty answer means that none had expired. Every daemon does; so can pg_cron.
CREATE OR REPLACE FUNCTION public.reap_expired_leases(most integer DEFAULT 100)
RETURNS TABLE (job_id uuid, state text)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
    WITH expired AS MATERIALIZED (
        SELECT lease.job_id, lease.epoch
        FROM public.training_leases AS lease
        JOIN public.training_jobs AS job ON job.id = lease.job_id
        WHERE lease.expires_at < clock_timestamp()
          -- Nobody could renew while the server was down: after a restart each lease has its whole length again.
          AND pg_postmaster_start_time() + (lease.expires_at - lease.heartbeat_at) < clock_timestamp()
        ORDER BY lease.expires_at
        LIMIT most
        FOR UPDATE OF lease SKIP LOCKED
        -- The job as well: one that the app keeps locked is reaped later, and holds up no other. Nor can the app's own
        -- UPDATE of many jobs and this one wait for each other.
        FOR NO KEY UPDATE OF job SKIP LOCKED
    ),
    -- Checked again where it is deleted: a heartbeat that came first has moved expires_at.
    ended AS (
        DELETE FROM public.training_leases AS lease
        USING expired
        WHERE lease.job_id = expired.job_id
          AND lease.epoch = expired.epoch
          AND lease.expires_at < clock_timestamp()
        RETURNING lease.job_id, lease.epoch
    ),
    moved AS (
        UPDATE public.training_jobs AS job
        SET status = CASE WHEN job.attempt < job.max_attempts THEN 'queued' ELSE 'failed' END,
            current_stage = CASE WHEN job.attempt < job.max_attempts THEN 'queued' ELSE job.current_stage END,
            -- At once the first time; a job that takes its host down again and again waits longer each time.
            run_after = CASE
                WHEN job.attempt BETWEEN 2 AND job.max_attempts - 1
                THEN clock_timestamp() + least(300, 15 * 2 ^ (job.attempt - 2)) * interval '1 second'
            END,
            error_code = 'worker_lost',
            error_message = format('the host that ran this job stopped answering (attempt %s of %s)',
                job.attempt, job.max_attempts),
            error_hint = CASE
                WHEN job.attempt < job.max_attempts
                THEN 'it is tried again from its last checkpoint'
                ELSE 'it may be too large for the host: reduce batch_size, lora_rank or max_length, then retry it'
            END,
            estimated_completion_at = NULL,
            completed_at = CASE WHEN job.attempt < job.max_attempts THEN NULL ELSE clock_timestamp() END,
            final_cost = CASE WHEN job.attempt < job.max_attempts THEN NULL ELSE job.current_cost END
        FROM ended
        WHERE job.id = ended.job_id
          AND job.lease_epoch = ended.epoch
          AND job.status IN ('initializing', 'running')
        RETURNING job.id, job.status
    )
    SELECT ended.job_id, coalesce(moved.status, job.status)::text
    FROM ended
    LEFT JOIN moved ON moved.id = ended.job_id
    LEFT JOIN public.training_jobs AS job ON job.id = ended.job_id
$$;

-- Lets the rows in that were queued before the trainer was installed. Returns how many.
CREATE OR REPLACE FUNCTION public.release_held_jobs() RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    released integer;
BEGIN
    PERFORM public.training_require_owner(NULL);
    WITH needed AS (
        SELECT job.id, needs.*
        FROM public.training_jobs AS job
        CROSS JOIN LATERAL public.training_read_needs(job.gpu_config, job.hyperparameters) AS needs
        WHERE job.status = 'queued' AND job.held
        FOR NO KEY UPDATE OF job
    )
    UPDATE public.training_jobs AS job
    SET held = false,
        due = job.run_after IS NULL OR job.run_after <= clock_timestamp(),
        need_gpus = needed.gpus,
        need_gpu_memory_gb = needed.gpu_memory_gb,
        need_gpu_type = needed.gpu_type,
        base_model = needed.base_model
    FROM needed
    WHERE job.id = needed.id AND job.held;
    GET DIAGNOSTICS released = ROW_COUNT;
    IF released > 0 THEN
        PERFORM pg_notify('training_jobs', 'queued');
    END IF;
    RETURN released;
END
$$;

-- Tries a failed or cancelled job again, from zero, by its owner or the operator. Returns its status JSON.
CREATE OR REPLACE FUNCTION public.retry_training_job(job_id uuid) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    job public.training_jobs;
BEGIN
    SELECT * INTO job FROM public.training_jobs AS found
    WHERE found.id = retry_training_job.job_id
    FOR NO KEY UPDATE;
    PERFORM public.training_require_owner(job.user_id);
    IF job.id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'no such job of yours';
    END IF;
    IF job.status NOT IN ('failed', 'cancelled') THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = format('the job is %s', job.status),
            HINT = 'only a failed or cancelled job can be tried again';
    END IF;
    UPDATE public.training_jobs AS again
    SET status = 'queued',
        current_stage = 'queued',
        progress = 0,
        current_epoch = 0,
        current_step = 0,
        attempt = 0,
        retry_count = 0,
        run_after = NULL,
        started_at = NULL,
        completed_at = NULL,
        estimated_completion_at = NULL,
        current_cost = 0,
        final_cost = NULL,
        error_code = NULL,
        error_message = NULL,
        error_hint = NULL,
        error_stack = NULL,
        queued_at = clock_timestamp()
    WHERE again.id = job.id
    RETURNING * INTO job;
    RETURN public.training_status_json(job) || jsonb_build_object('job_id', job.id);
END
$$;

-- Cancels an unfinished job, with the caller's own rights. Cancelling twice is no error. Returns its status JSON.
CREATE OR REPLACE FUNCTION public.cancel_training_job(job_id uuid) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = ''
AS $$
DECLARE
    job public.training_jobs;
BEGIN
    UPDATE public.training_jobs AS wanted
    SET status = 'cancelled'
    WHERE wanted.id = cancel_training_job.job_id AND wanted.status <> 'cancelled'
    RETURNING * INTO job;
    IF NOT FOUND THEN
        SELECT * INTO job FROM public.training_jobs AS found WHERE found.id = cancel_training_job.job_id;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'no such job of yours';
        END IF;
    END IF;
    RETURN public.training_status_json(job) || jsonb_build_object('job_id', job.id);
END
$$;

-- The status JSON of a job, with the caller's own rights.
CREATE OR REPLACE FUNCTION public.training_job_status(job_id uuid) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
    job public.training_jobs;
BEGIN
    SELECT * INTO job FROM public.training_jobs AS found WHERE found.id = training_job_status.job_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'no such job of yours';
    END IF;
    RETURN public.training_status_json(job) || jsonb_build_object('job_id', job.id);
END
$$;

-- Inserts a job from the older HTTP contract's JSON, with the caller's own rights. A user submits for himself; the
-- app's server and the daemon name `user_id`. A repeated submit (the same job_id) is the same job.
CREATE OR REPLACE FUNCTION public.submit_training_job(job jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = ''
AS $$
DECLARE
    uuid_shape constant text := '^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$';
    own_id text := nullif(job ->> 'job_id', '');
    made public.training_jobs;
    owner_id uuid;
    row_id uuid;
BEGIN
    IF jsonb_typeof(job) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'PT400', MESSAGE = 'a job is submitted as a JSON object';
    END IF;
    IF current_user = 'authenticated' THEN
        owner_id := (coalesce(
            nullif(current_setting('request.jwt.claim.sub', true), ''),
            nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
        ))::uuid;
    ELSE
        owner_id := (job ->> 'user_id')::uuid;
    END IF;
    IF owner_id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PT400', MESSAGE = 'a job needs an owner', HINT = 'set user_id';
    END IF;
    row_id := CASE WHEN own_id ~ uuid_shape THEN own_id::uuid ELSE gen_random_uuid() END;
    INSERT INTO public.training_jobs (
        id, user_id, client_job_id, dataset_id, dataset_url, callback_url, preset_id, hyperparameters, gpu_config,
        priority, run_after, max_attempts, max_cost, deadline_at
    )
    VALUES (
        row_id,
        owner_id,
        CASE WHEN own_id !~ uuid_shape THEN own_id END,
        (job ->> 'dataset_id')::uuid,
        job ->> 'dataset_url',
        job ->> 'callback_url',
        coalesce(job ->> 'preset_id', 'custom'),
        coalesce(job -> 'hyperparameters', '{}'),
        coalesce(job -> 'gpu_config', '{}'),
        coalesce((job ->> 'priority')::integer, 0),
        (job ->> 'run_after')::timestamptz,
        coalesce((job ->> 'max_attempts')::integer, 3),
        (job ->> 'max_cost')::numeric,
        (job ->> 'deadline_at')::timestamptz
    )
    RETURNING * INTO made;
    RETURN public.training_status_json(made) || jsonb_build_object('job_id', made.id, 'external_job_id', made.id);
EXCEPTION WHEN unique_violation THEN
    SELECT * INTO made
    FROM public.training_jobs AS found
    WHERE found.user_id = owner_id AND (found.id = row_id OR found.client_job_id = own_id);
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = 'this job_id is taken', HINT = 'send another one, or none';
    END IF;
    RETURN public.training_status_json(made) || jsonb_build_object('job_id', made.id, 'external_job_id', made.id);
END
$$;

-- Sends a callback again: one that was given up, or one that its receiver lost. By the job's owner or the operator.
CREATE OR REPLACE FUNCTION public.resend_callback(callback_id uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    owner_id uuid;
BEGIN
    SELECT callback.user_id INTO owner_id
    FROM public.training_callbacks AS callback
    WHERE callback.id = resend_callback.callback_id;
    PERFORM public.training_require_owner(owner_id);
    UPDATE public.training_callbacks AS callback
    SET state = 'pending',
        attempts = 0,
        next_at = clock_timestamp(),
        locked_until = NULL,
        lock_token = NULL,
        delivered_at = NULL
    WHERE callback.id = resend_callback.callback_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PT404', MESSAGE = 'no such callback of yours';
    END IF;
END
$$;

-- Deletes history of finished jobs that is older than an age, at most `most` rows of each kind a call; call it
-- again until all three answers are zero. Jobs, artifacts and costs stay.
CREATE OR REPLACE FUNCTION public.prune_training_history(older_than interval, most integer DEFAULT 10000)
RETURNS TABLE (metrics_points bigint, events bigint, callbacks bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
    WITH allowed AS MATERIALIZED (
        SELECT public.training_require_owner(NULL)
    ),
    finished AS MATERIALIZED (
        SELECT job.id
        FROM allowed
        CROSS JOIN public.training_jobs AS job
        WHERE job.status IN ('completed', 'failed', 'cancelled')
          AND job.completed_at < clock_timestamp() - older_than
    ),
    points AS (
        DELETE FROM public.metrics_points AS point
        WHERE point.id IN (
            SELECT old.id FROM public.metrics_points AS old JOIN finished ON finished.id = old.job_id LIMIT most
        )
        RETURNING 1
    ),
    story AS (
        DELETE FROM public.training_events AS event
        WHERE event.id IN (
            SELECT old.id FROM public.training_events AS old JOIN finished ON finished.id = old.job_id LIMIT most
        )
        RETURNING 1
    ),
    told AS (
        DELETE FROM public.training_callbacks AS callback
        WHERE callback.id IN (
            SELECT old.id
            FROM public.training_callbacks AS old
            JOIN finished ON finished.id = old.job_id
            WHERE old.state = 'delivered'
            LIMIT most
        )
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM points), (SELECT count(*) FROM story), (SELECT count(*) FROM told)
$$;

GRANT CREATE ON SCHEMA public TO training_daemon;
ALTER FUNCTION public.reap_expired_leases(integer) OWNER TO training_daemon;
ALTER FUNCTION public.release_held_jobs() OWNER TO training_daemon;
ALTER FUNCTION public.retry_training_job(uuid) OWNER TO training_daemon;
ALTER FUNCTION public.resend_callback(uuid) OWNER TO training_daemon;
ALTER FUNCTION public.prune_training_history(interval, integer) OWNER TO training_daemon;
REVOKE CREATE ON SCHEMA public FROM training_daemon;

REVOKE EXECUTE ON FUNCTION
    public.training_require_owner(uuid), public.reap_expired_leases(integer), public.release_held_jobs(),
    public.retry_training_job(uuid), public.cancel_training_job(uuid), public.training_job_status(uuid),
    public.submit_training_job(jsonb), public.resend_callback(uuid), public.prune_training_history(interval, integer)
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION
    public.retry_training_job(uuid), public.cancel_training_job(uuid), public.training_job_status(uuid),
    public.submit_training_job(jsonb), public.resend_callback(uuid)
TO authenticated, service_role, training_daemon;
GRANT EXECUTE ON FUNCTION
    public.reap_expired_leases(integer), public.release_held_jobs(), public.prune_training_history(interval, integer)
TO service_role, training_daemon;
GRANT EXECUTE ON FUNCTION public.training_require_owner(uuid) TO training_daemon;
