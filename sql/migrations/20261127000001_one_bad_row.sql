-- One row that the database refuses to let us write (a constraint, a trigger of the app's own) holds up no other:
-- what was one statement over many rows is tried as one first, and row by row where somebody objects.

SET LOCAL lock_timeout = '1s';

-- Ends leases that expired: their jobs go back to the queue, or to failed when no attempt is left.
-- Safe to call by anybody at any time; an empty answer means that none had expired, or that the tables were locked a
-- moment ago. Every daemon does; so can pg_cron. A job that could not be moved comes back in the state that it is still
-- in (initializing, running), keeps its expired lease, and is tried again at the next call; its story says who objects.
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
                SELECT lease.job_id, lease.epoch
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
                said := 'the database refuses to take the job back from its lost host: ' || SQLERRM;
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

-- Lets rows in that are held: queued before the trainer was installed, or set aside because the database refused their
-- claim. Returns how many; one that cannot be released is warned of and stays.
CREATE OR REPLACE FUNCTION public.release_held_jobs() RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    released integer := 0;
    one uuid;
    waiting uuid[];
    now_released integer;
BEGIN
    PERFORM public.training_require_owner(NULL);
    LOOP
        BEGIN
            WITH needed AS (
                SELECT job.id, needs.*
                FROM public.training_jobs AS job
                CROSS JOIN LATERAL public.training_read_needs(job.gpu_config, job.hyperparameters) AS needs
                WHERE job.status = 'queued' AND job.held AND (one IS NULL OR job.id = one)
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
            GET DIAGNOSTICS now_released = ROW_COUNT;
            released := released + now_released;
        EXCEPTION WHEN OTHERS THEN
            IF left(SQLSTATE, 2) IN ('40', '53', '55', '57', '58') THEN
                RAISE;
            END IF;
            IF waiting IS NULL THEN
                waiting := ARRAY(
                    SELECT job.id FROM public.training_jobs AS job WHERE job.status = 'queued' AND job.held
                );
            ELSE
                RAISE WARNING 'job % stays held: %', one, SQLERRM;
            END IF;
        END;
        EXIT WHEN waiting IS NULL OR waiting = '{}';
        one := waiting[1];
        waiting := waiting[2:];
    END LOOP;
    IF released > 0 THEN
        PERFORM pg_notify('training_jobs', 'queued');
    END IF;
    RETURN released;
END
$$;

-- What waits, in claiming order, and why. As before, but a held job says who holds it back.
CREATE OR REPLACE VIEW public.training_queue WITH (security_invoker = true) AS
SELECT
    numbered.place,
    job.id AS job_id,
    job.user_id,
    job.priority,
    job.queued_at,
    job.run_after,
    job.attempt,
    job.base_model,
    job.need_gpus,
    job.need_gpu_memory_gb,
    job.need_gpu_type,
    CASE
        WHEN job.held THEN 'held: ' || coalesce(
            (
                SELECT event.message
                FROM public.training_events AS event
                WHERE event.job_id = job.id AND event.kind = 'set_aside'
                ORDER BY event.id DESC
                LIMIT 1
            ),
            'queued before the trainer was installed'
        )
        WHEN NOT job.due AND job.run_after > clock_timestamp() THEN
            CASE WHEN job.attempt > 0 THEN 'retry scheduled' ELSE 'scheduled' END
        WHEN leased.here THEN 'its last run is still ending'
        WHEN workers.alive = 0 THEN 'no worker'
        WHEN workers.enough_gpus = 0 THEN format('no worker has %s GPUs', job.need_gpus)
        WHEN workers.enough_memory = 0 THEN format('GPU too small: %s GB asked for', job.need_gpu_memory_gb)
        WHEN workers.right_type = 0 THEN format('no worker has a GPU of the type %s', job.need_gpu_type)
        WHEN workers.right_model = 0 THEN format('no worker serves %s', job.base_model)
        WHEN workers.user_cap <= running.jobs THEN 'cap reached'
        WHEN workers.idle_slots = 0 THEN 'all workers busy'
        ELSE 'next'
    END AS waiting_reason
FROM public.training_jobs AS job
-- Only who asks for the place has the whole queue numbered: GROUP BY tells the planner that at most one row joins, and
-- an outer join that adds neither row nor column is left out. So why one job waits is a matter of its own row.
LEFT JOIN (
    SELECT line.id, min(line.place) AS place
    FROM (
        SELECT
            waiting.id,
            row_number() OVER (ORDER BY waiting.due DESC, waiting.priority DESC, waiting.queued_at, waiting.id) AS place
        FROM public.training_jobs AS waiting
        WHERE waiting.status = 'queued'
    ) AS line
    GROUP BY line.id
) AS numbered ON numbered.id = job.id
CROSS JOIN LATERAL (
    SELECT
        count(*) AS alive,
        count(*) FILTER (WHERE fits.gpus) AS enough_gpus,
        count(*) FILTER (WHERE fits.gpus AND fits.memory) AS enough_memory,
        count(*) FILTER (WHERE fits.gpus AND fits.memory AND fits.kind) AS right_type,
        count(*) FILTER (WHERE fits.gpus AND fits.memory AND fits.kind AND fits.model) AS right_model,
        max(coalesce(worker.user_cap, 2147483647))
            FILTER (WHERE fits.gpus AND fits.memory AND fits.kind AND fits.model) AS user_cap,
        coalesce(sum(greatest(worker.slots - worker.busy, 0))
            FILTER (WHERE fits.gpus AND fits.memory AND fits.kind AND fits.model), 0) AS idle_slots
    FROM public.training_live_workers AS worker
    CROSS JOIN LATERAL (
        SELECT
            -- A CPU host takes what its settings tell it to take.
            worker.device = 'cpu' OR worker.gpu_count >= job.need_gpus AS gpus,
            worker.gpu_memory_gb IS NULL OR job.need_gpu_memory_gb IS NULL
                OR job.need_gpu_memory_gb * 0.95 <= worker.gpu_memory_gb AS memory,
            worker.gpu_type IS NULL OR job.need_gpu_type IS NULL
                OR strpos(lower(worker.gpu_type), lower(job.need_gpu_type)) > 0 AS kind,
            worker.models IS NULL OR job.base_model IS NULL OR job.base_model = ANY (worker.models) AS model
    ) AS fits
) AS workers
CROSS JOIN LATERAL (
    SELECT count(*) AS jobs FROM public.training_leases AS lease WHERE lease.user_id = job.user_id
) AS running
CROSS JOIN LATERAL (
    SELECT EXISTS (SELECT FROM public.training_leases AS lease WHERE lease.job_id = job.id) AS here
) AS leased
WHERE job.status = 'queued';

GRANT CREATE ON SCHEMA public TO training_daemon;
ALTER FUNCTION public.reap_expired_leases(integer) OWNER TO training_daemon;
ALTER FUNCTION public.release_held_jobs() OWNER TO training_daemon;
REVOKE CREATE ON SCHEMA public FROM training_daemon;

REVOKE EXECUTE ON FUNCTION public.reap_expired_leases(integer), public.release_held_jobs()
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.reap_expired_leases(integer), public.release_held_jobs()
TO service_role, training_daemon;
