-- Texts of the database's own making that reach a user are sentences, and an error says what to do as well: the app's
-- page shows `error_message` alone. `error_hint` repeats the advice for whoever shows the two apart.
-- Owners and grants of the functions stay: they are replaced, not made.

SET LOCAL lock_timeout = '1s';

-- The status JSON of 20261122000006 again; what is new is the sentence of a cancelled job.
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
        'error_message', CASE WHEN job.status = 'cancelled' THEN 'Cancelled by request.' ELSE job.error_message END,
        'error_hint', job.error_hint
    )
$$;

-- The cost and the notifications of 20261122000007 again; what is new is what the story says of a fault, and that a
-- notification says the advice once. The artifact, with the same words, is in 20261128000006.
CREATE OR REPLACE FUNCTION public.training_record_cost(job public.training_jobs, amount numeric) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
SET lock_timeout = '2s'
AS $$
DECLARE
    facts jsonb := jsonb_strip_nulls(jsonb_build_object(
        'gpu_type', coalesce(job.need_gpu_type, job.gpu_config ->> 'gpu_type'),
        'gpu_count', job.need_gpus,
        'duration_hours', round((extract(epoch FROM job.completed_at - job.started_at) / 3600)::numeric, 4),
        'attempts', job.attempt,
        'lease_epoch', job.lease_epoch
    ));
BEGIN
    IF amount IS NULL OR to_regclass('public.cost_records') IS NULL THEN
        RETURN;
    END IF;
    UPDATE public.cost_records AS cost
    SET amount = training_record_cost.amount,
        details = facts
    WHERE cost.job_id = job.id
      AND cost.cost_type = 'training_compute'
      AND cost.details ->> 'lease_epoch' = job.lease_epoch::text;
    IF NOT FOUND THEN
        INSERT INTO public.cost_records (user_id, job_id, cost_type, amount, details, billing_period)
        VALUES (job.user_id, job.id, 'training_compute', training_record_cost.amount, facts,
            date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date);
    END IF;
    -- A cancel is part of the app's own transaction, whose constraints are its own business.
    IF job.status <> 'cancelled' THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    VALUES (job.id, job.lease_epoch, 'notice', format('The row in cost_records could not be written: %s.', rtrim(SQLERRM, '.')),
        jsonb_build_object('code', 'side_table_failed', 'table', 'cost_records', 'sqlstate', SQLSTATE));
END
$$;

CREATE OR REPLACE FUNCTION public.training_notify_user(job public.training_jobs, move text) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
SET lock_timeout = '2s'
AS $$
DECLARE
    job_page text := '/training/jobs/' || job.id;
    about jsonb := jsonb_build_object('job_id', job.id);
BEGIN
    IF to_regclass('public.notifications') IS NULL THEN
        RETURN;
    END IF;
    IF move = 'started' THEN
        INSERT INTO public.notifications (user_id, type, title, message, priority, action_url, metadata)
        VALUES (job.user_id, 'job_started', 'Training has started', 'Your model is being trained.', 'low', job_page, about);
    ELSIF move = 'completed' THEN
        INSERT INTO public.notifications (user_id, type, title, message, priority, action_url, metadata)
        VALUES (job.user_id, 'job_completed', 'Training is complete', 'Your model has been trained.', 'medium', job_page, about);
        IF job.artifact_id IS NOT NULL THEN
            INSERT INTO public.notifications (user_id, type, title, message, priority, action_url, metadata)
            VALUES (job.user_id, 'artifact_ready', 'Your adapter is ready', 'The adapter can be downloaded.', 'medium',
                '/models/' || job.artifact_id, about || jsonb_build_object('artifact_id', job.artifact_id));
        END IF;
    ELSIF move = 'failed' THEN
        INSERT INTO public.notifications (user_id, type, title, message, priority, action_url, metadata)
        VALUES (job.user_id, 'job_failed', 'Training has failed',
            -- A host of an older version writes the message without the advice.
            CASE
                WHEN right(job.error_message, length(job.error_hint)) = job.error_hint THEN job.error_message
                ELSE concat_ws(' ', coalesce(job.error_message, 'The training ended with an error.'), job.error_hint)
            END,
            'high', job_page, about || jsonb_build_object('error_code', job.error_code));
    ELSIF move = 'cancelled' THEN
        INSERT INTO public.notifications (user_id, type, title, message, priority, action_url, metadata)
        VALUES (job.user_id, 'job_cancelled', 'Training was cancelled', 'The training was cancelled.', 'low', job_page, about);
    END IF;
    -- A cancel is part of the app's own transaction, whose constraints are its own business.
    IF move <> 'cancelled' THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    VALUES (job.id, job.lease_epoch, 'notice', format('The row in notifications could not be written: %s.', rtrim(SQLERRM, '.')),
        jsonb_build_object('code', 'side_table_failed', 'table', 'notifications', 'sqlstate', SQLSTATE));
END
$$;

-- The reaper of 20261127000001 again; what is new is its sentences.
CREATE OR REPLACE FUNCTION public.reap_expired_leases(most integer DEFAULT 100)
RETURNS TABLE (job_id uuid, state text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
#variable_conflict use_column
DECLARE
    asked_at timestamptz := clock_timestamp();
    only_id uuid;
    waiting uuid[] := '{}';
    ids uuid[];
    states text[];
    said text;
BEGIN
    -- Whoever waits here behind a lock on the whole table (VACUUM FULL, ALTER TABLE, CREATE INDEX) waits beside the
    -- heartbeats: when it is gone each holder first gets the time to renew.
    LOCK TABLE public.training_leases, public.training_jobs IN ROW EXCLUSIVE MODE;
    IF clock_timestamp() - asked_at > interval '1 second' THEN
        RETURN;
    END IF;
    LOOP
        BEGIN
            -- What the app checks at the end of a transaction only is checked here, where it can be caught.
            SET CONSTRAINTS ALL IMMEDIATE;
            WITH expired AS MATERIALIZED (
                SELECT
                    lease.job_id,
                    lease.epoch,
                    CASE
                        WHEN job.attempt < job.max_attempts THEN 'It is tried again from its last checkpoint.'
                        ELSE 'It may be too large for the host: reduce batch_size, lora_rank or max_length, then retry it.'
                    END AS advice
                FROM public.training_leases AS lease
                JOIN public.training_jobs AS job ON job.id = lease.job_id
                WHERE lease.expires_at < clock_timestamp()
                  AND (only_id IS NULL OR lease.job_id = only_id)
                  -- Nobody could renew while the server was down: after a restart each lease has its whole length again.
                  AND pg_postmaster_start_time() + (lease.expires_at - lease.heartbeat_at) < clock_timestamp()
                ORDER BY lease.expires_at
                LIMIT most
                FOR UPDATE OF lease SKIP LOCKED
                -- The job as well: one that the app keeps locked is reaped later, and holds up no other. Nor can the
                -- app's own UPDATE of many jobs and this one wait for each other.
                FOR NO KEY UPDATE OF job SKIP LOCKED
            ),
            -- Checked again where it is deleted: a heartbeat that came first has moved expires_at.
            ended AS (
                DELETE FROM public.training_leases AS lease
                USING expired
                WHERE lease.job_id = expired.job_id
                  AND lease.epoch = expired.epoch
                  AND lease.expires_at < clock_timestamp()
                RETURNING lease.job_id, lease.epoch, expired.advice
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
                    error_message = format('The host that ran this job stopped answering (attempt %s of %s). %s',
                        job.attempt, job.max_attempts, ended.advice),
                    error_hint = ended.advice,
                    estimated_completion_at = NULL,
                    completed_at = CASE WHEN job.attempt < job.max_attempts THEN NULL ELSE clock_timestamp() END,
                    final_cost = CASE WHEN job.attempt < job.max_attempts THEN NULL ELSE job.current_cost END
                FROM ended
                WHERE job.id = ended.job_id
                  AND job.lease_epoch = ended.epoch
                  AND job.status IN ('initializing', 'running')
                RETURNING job.id, job.status
            )
            SELECT array_agg(ended.job_id), array_agg(coalesce(moved.status, job.status)::text)
            INTO ids, states
            FROM ended
            LEFT JOIN moved ON moved.id = ended.job_id
            LEFT JOIN public.training_jobs AS job ON job.id = ended.job_id;
            RETURN QUERY
            SELECT reaped.id, reaped.state
            FROM unnest(ids, states) AS reaped (id, state);
        EXCEPTION WHEN OTHERS THEN
            -- Not now, says the server itself: no row is to blame.
            IF left(SQLSTATE, 2) IN ('40', '53', '55', '57', '58') THEN
                RAISE;
            END IF;
            IF only_id IS NULL THEN
                waiting := ARRAY(
                    SELECT lease.job_id
                    FROM public.training_leases AS lease
                    WHERE lease.expires_at < clock_timestamp()
                    ORDER BY lease.expires_at
                );
            ELSE
                said := format('The database refuses to take the job back from its lost host: %s.', rtrim(SQLERRM, '.'));
                RAISE WARNING 'job %: %', only_id, said;
                RETURN QUERY
                SELECT job.id, job.status::text FROM public.training_jobs AS job WHERE job.id = only_id;
                BEGIN
                    -- Once an hour: every daemon tries this several times a minute.
                    INSERT INTO public.training_events (job_id, epoch, kind, message)
                    SELECT job.id, job.lease_epoch, 'notice', said
                    FROM public.training_jobs AS job
                    WHERE job.id = only_id
                      AND NOT EXISTS (
                          SELECT FROM public.training_events AS event
                          WHERE event.job_id = job.id
                            AND event.message = said
                            AND event.at > clock_timestamp() - interval '1 hour'
                      );
                EXCEPTION WHEN OTHERS THEN
                    RAISE WARNING 'job %: its story cannot be written: %', only_id, SQLERRM;
                END;
            END IF;
        END;
        EXIT WHEN waiting = '{}';
        only_id := waiting[1];
        waiting := waiting[2:];
    END LOOP;
END
$$;
