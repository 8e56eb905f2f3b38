-- The guard: the state machine, kept by the database itself. Every role, every move, no exception by convention.
-- Refusals carry SQLSTATE PT409, which PostgREST turns into HTTP 409.

SET LOCAL lock_timeout = '1s';

-- The hardware and the model that a row asks for, from both spellings of its JSON. Never raises: what is
-- garbage here is reported by the daemon as invalid_spec, with all faults, instead of breaking the app's insert.
CREATE OR REPLACE FUNCTION public.training_read_needs(
    gpu_config jsonb,
    hyperparameters jsonb,
    OUT gpus smallint,
    OUT gpu_memory_gb numeric,
    OUT gpu_type text,
    OUT base_model text
)
LANGUAGE plpgsql IMMUTABLE
SET search_path = ''
AS $$
DECLARE
    wanted_gpus text := coalesce(gpu_config ->> 'num_gpus', gpu_config ->> 'count');
    wanted_memory text := gpu_config ->> 'gpu_memory_gb';
    wanted_type jsonb := coalesce(gpu_config -> 'gpu_type', gpu_config -> 'type');
BEGIN
    gpus := CASE WHEN wanted_gpus ~ '^[0-9]{1,3}(\.0*)?$' THEN greatest(split_part(wanted_gpus, '.', 1)::int, 1) ELSE 1 END;
    gpu_memory_gb := CASE WHEN wanted_memory ~ '^[0-9]{1,5}(\.[0-9]{1,20})?$' THEN nullif(wanted_memory::numeric, 0) END;
    gpu_type := CASE WHEN jsonb_typeof(wanted_type) = 'string' THEN nullif(left(btrim(wanted_type #>> '{}'), 100), '') END;
    base_model := CASE
        WHEN jsonb_typeof(hyperparameters -> 'base_model') = 'string'
        THEN nullif(left(btrim(hyperparameters ->> 'base_model'), 200), '')
    END;
END
$$;

-- What a caller may ask for. Here and not as CHECKs of the table: Postgres reads those from their text again in every
-- statement that writes a row, the daemon's claims and progress among them, for limits that only a caller sets.
CREATE OR REPLACE FUNCTION public.training_check_limits(
    max_attempts integer,
    max_cost numeric,
    run_after timestamptz,
    deadline_at timestamptz
) RETURNS void
LANGUAGE plpgsql IMMUTABLE
SET search_path = ''
AS $$
DECLARE
    wrong text := CASE
        WHEN NOT max_attempts BETWEEN 1 AND 100 THEN 'max_attempts must be between 1 and 100'
        -- NaN is greater than every number, and no cost ever reaches it.
        WHEN NOT (max_cost > 0 AND max_cost < 'NaN') THEN 'max_cost must be a number above 0'
        -- Infinity and the year 20000 are instants that a daemon can neither read nor subtract from.
        WHEN NOT run_after BETWEEN '0001-01-02Z' AND '9999-12-31Z' THEN 'run_after must be an instant before the year 10000'
        WHEN NOT deadline_at BETWEEN '0001-01-02Z' AND '9999-12-31Z' THEN 'deadline_at must be an instant before the year 10000'
    END;
BEGIN
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '23514', MESSAGE = wrong,
            HINT = 'leave it out where nothing is to be limited';
    END IF;
END
$$;

-- What the dataset of a dataset_url is called. The address loses its login and its query, where signatures live.
CREATE OR REPLACE FUNCTION public.training_name_url(url text, OUT file_name text, OUT description text)
LANGUAGE plpgsql IMMUTABLE
SET search_path = ''
AS $$
DECLARE
    address text := split_part(split_part(url, '?', 1), '#', 1);
BEGIN
    file_name := left(coalesce(nullif(regexp_replace(address, '^.*/', ''), ''), 'dataset'), 200);
    description := 'Read from ' || regexp_replace(address, '//[^/@]*@', '//');
END
$$;

CREATE OR REPLACE FUNCTION public.training_jobs_guard_insert() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
    needs record;
    named record;
BEGIN
    IF coalesce(NEW.status, 'queued') <> 'queued' THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409',
            MESSAGE = format('a job is inserted as queued, not as %s', NEW.status),
            HINT = 'leave status out: the trainer moves the job';
    END IF;

    -- What only the service writes begins at its beginning, whatever the caller sent.
    NEW.status := 'queued';
    NEW.current_stage := 'queued';
    NEW.progress := 0;
    NEW.current_epoch := 0;
    NEW.current_step := 0;
    NEW.current_metrics := NULL;
    NEW.queued_at := clock_timestamp();
    NEW.created_at := NEW.queued_at;
    NEW.updated_at := NEW.queued_at;
    NEW.started_at := NULL;
    NEW.completed_at := NULL;
    NEW.estimated_completion_at := NULL;
    NEW.current_cost := 0;
    NEW.final_cost := NULL;
    NEW.error_message := NULL;
    NEW.error_stack := NULL;
    NEW.error_code := NULL;
    NEW.error_hint := NULL;
    NEW.retry_count := 0;
    NEW.external_job_id := NULL;
    NEW.artifact_id := NULL;
    NEW.attempt := 0;
    NEW.lease_epoch := 0;
    NEW.held := false;
    NEW.last_progress_at := NULL;
    NEW.adapter_path := NULL;
    NEW.adapter_sha256 := NULL;
    NEW.adapter_bytes := NULL;
    NEW.result := NULL;

    IF current_user = 'authenticated' THEN
        NEW.priority := 0;
        NEW.max_attempts := 3;
        IF NEW.dataset_id IS NOT NULL AND NOT EXISTS (
            SELECT FROM public.datasets AS dataset
            WHERE dataset.id = NEW.dataset_id AND dataset.user_id = NEW.user_id
        ) THEN
            RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'this dataset is not yours',
                HINT = 'use the id of a row of datasets that you own';
        END IF;
    END IF;

    IF NEW.dataset_id IS NULL THEN
        IF NEW.dataset_url IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = '23502', MESSAGE = 'a job needs a dataset',
                HINT = 'set dataset_id, or dataset_url to an https address of the file';
        END IF;
        NEW.id := coalesce(NEW.id, gen_random_uuid());
        NEW.dataset_id := gen_random_uuid();
        named := public.training_name_url(NEW.dataset_url);
        -- The app's dataset_id stays NOT NULL: a row that says where the file comes from. No bucket of that name
        -- is ever read.
        INSERT INTO public.datasets
            (id, user_id, name, description, storage_bucket, storage_path, file_name, file_size, status, training_ready)
        VALUES (
            NEW.dataset_id, NEW.user_id, named.file_name, named.description, 'url', 'urls/' || NEW.id, named.file_name,
            0, 'ready', true
        )
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            -- An upsert comes by here before it meets its row, and a deleted job leaves its dataset behind.
            SELECT dataset.id INTO NEW.dataset_id
            FROM public.datasets AS dataset
            WHERE dataset.storage_path = 'urls/' || NEW.id AND dataset.user_id = NEW.user_id;
            IF NOT FOUND THEN
                RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = format('the id %s is taken', NEW.id),
                    HINT = 'leave id out: the database chooses one';
            END IF;
            -- Whether an upsert changes the address of a job that there is, its update says. The daemon renames nothing:
            -- its password lies on rented hosts.
            IF current_user <> 'training_daemon'
                AND NOT EXISTS (SELECT FROM public.training_jobs AS job WHERE job.id = NEW.id)
            THEN
                UPDATE public.datasets AS dataset
                SET name = named.file_name, description = named.description, file_name = named.file_name
                WHERE dataset.id = NEW.dataset_id;
            END IF;
        END IF;
    END IF;

    PERFORM public.training_check_limits(NEW.max_attempts, NEW.max_cost, NEW.run_after, NEW.deadline_at);
    needs := public.training_read_needs(NEW.gpu_config, NEW.hyperparameters);
    NEW.need_gpus := needs.gpus;
    NEW.need_gpu_memory_gb := needs.gpu_memory_gb;
    NEW.need_gpu_type := needs.gpu_type;
    NEW.base_model := needs.base_model;
    NEW.due := NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp();
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION public.training_jobs_guard_update() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
    needs record;
    named record;
    cancelled public.training_jobs;
BEGIN
    -- The daemon's progress, every second: seen here, and not by a WHEN of the trigger, which is parsed anew each time.
    -- What is due is what the claim takes: nothing but a waiting job may ever be.
    IF current_user = 'training_daemon' AND NEW.status = OLD.status AND NEW.lease_epoch = OLD.lease_epoch
        AND NOT (NEW.due AND (NEW.status <> 'queued' OR NEW.held))
    THEN
        RETURN NEW;
    END IF;

    -- Cancel, by the app's own UPDATE or by function: the clock and the cost are the database's, whatever was sent.
    IF NEW.status = 'cancelled' AND OLD.status IS DISTINCT FROM 'cancelled' THEN
        IF OLD.status IN ('completed', 'failed') THEN
            RAISE EXCEPTION USING ERRCODE = 'PT409',
                MESSAGE = format('the job is already %s and cannot be cancelled', OLD.status),
                HINT = 'only a queued or running job can be cancelled';
        END IF;
        cancelled := OLD;
        cancelled.status := 'cancelled';
        cancelled.completed_at := clock_timestamp();
        cancelled.final_cost := coalesce(OLD.current_cost, 0);
        cancelled.estimated_completion_at := NULL;
        cancelled.run_after := NULL;
        cancelled.due := false;
        cancelled.held := false;
        RETURN cancelled;
    END IF;

    IF current_user = 'training_daemon' THEN
        -- The daemon's moves (daemon.queue.states.MOVES; a test compares the two). Words, not pairs: one list for Postgres to set up
        -- at each claim, instead of ten comparisons of rows.
        IF (OLD.status || ' to ' || NEW.status IN (
            'queued to initializing',
            'initializing to running',
            'initializing to completed', 'running to completed',
            'initializing to failed', 'running to failed',
            'initializing to queued', 'running to queued',
            'failed to queued', 'cancelled to queued'
        )) IS NOT TRUE THEN
            RAISE EXCEPTION USING ERRCODE = 'PT409',
                MESSAGE = format('no such move: %s to %s', OLD.status, NEW.status);
        END IF;
        IF NEW.lease_epoch <> OLD.lease_epoch + (NEW.status = 'initializing')::int THEN
            RAISE EXCEPTION USING ERRCODE = 'PT409',
                MESSAGE = format('the lease epoch rises by one at a claim and never else (%s to %s, %s to %s)',
                    OLD.lease_epoch, NEW.lease_epoch, OLD.status, NEW.status);
        END IF;
        IF NEW.status <> 'queued' THEN
            NEW.run_after := NULL;
            NEW.due := false;
            RETURN NEW;
        END IF;
        NEW.due := NOT NEW.held AND (NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp());
        RETURN NEW;
    END IF;

    -- Cancelled twice: nothing happens, and nothing is rewritten.
    IF OLD.status = 'cancelled' AND NEW.status = 'cancelled' THEN
        NEW.completed_at := OLD.completed_at;
        NEW.final_cost := OLD.final_cost;
        NEW.current_stage := OLD.current_stage;
    END IF;

    -- Rows that an older dispatcher runs itself: left to it, never claimed by us. A row it puts back is held.
    IF OLD.lease_epoch = 0 AND OLD.status IN ('initializing', 'running') AND current_user <> 'authenticated' THEN
        NEW.lease_epoch := 0;
        NEW.run_after := NULL;
        NEW.due := false;
        NEW.held := NEW.status = 'queued';
        RETURN NEW;
    END IF;

    IF NEW.status IS DISTINCT FROM OLD.status THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409',
            MESSAGE = format('the job is %s: only the trainer moves it to %s', OLD.status, NEW.status),
            HINT = 'you may cancel it; a failed or cancelled one is tried again by retry_training_job(id)';
    END IF;

    IF (NEW.id, NEW.user_id, NEW.client_job_id, NEW.created_at, NEW.queued_at, NEW.started_at, NEW.completed_at,
        NEW.estimated_completion_at, NEW.current_stage, NEW.progress, NEW.current_epoch, NEW.current_step,
        NEW.current_metrics, NEW.current_cost, NEW.final_cost, NEW.error_message, NEW.error_stack, NEW.error_code,
        NEW.error_hint, NEW.retry_count, NEW.external_job_id, NEW.attempt, NEW.lease_epoch, NEW.held, NEW.due,
        NEW.need_gpus, NEW.need_gpu_memory_gb, NEW.need_gpu_type, NEW.base_model, NEW.last_progress_at,
        NEW.adapter_path, NEW.adapter_sha256, NEW.adapter_bytes, NEW.result)
        IS DISTINCT FROM
       (OLD.id, OLD.user_id, OLD.client_job_id, OLD.created_at, OLD.queued_at, OLD.started_at, OLD.completed_at,
        OLD.estimated_completion_at, OLD.current_stage, OLD.progress, OLD.current_epoch, OLD.current_step,
        OLD.current_metrics, OLD.current_cost, OLD.final_cost, OLD.error_message, OLD.error_stack, OLD.error_code,
        OLD.error_hint, OLD.retry_count, OLD.external_job_id, OLD.attempt, OLD.lease_epoch, OLD.held, OLD.due,
        OLD.need_gpus, OLD.need_gpu_memory_gb, OLD.need_gpu_type, OLD.base_model, OLD.last_progress_at,
        OLD.adapter_path, OLD.adapter_sha256, OLD.adapter_bytes, OLD.result)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = 'this column is written by the trainer only',
            HINT = 'while a job is queued its spec, priority and run_after may be changed; later only its limits';
    END IF;

    IF OLD.status <> 'queued' AND
       (NEW.dataset_id, NEW.dataset_url, NEW.preset_id, NEW.hyperparameters, NEW.gpu_config, NEW.priority, NEW.run_after)
        IS DISTINCT FROM
       (OLD.dataset_id, OLD.dataset_url, OLD.preset_id, OLD.hyperparameters, OLD.gpu_config, OLD.priority, OLD.run_after)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409',
            MESSAGE = format('the job is %s: its spec can be changed only while it is queued', OLD.status);
    END IF;

    IF (NEW.max_attempts, NEW.max_cost, NEW.run_after, NEW.deadline_at)
        IS DISTINCT FROM (OLD.max_attempts, OLD.max_cost, OLD.run_after, OLD.deadline_at)
    THEN
        PERFORM public.training_check_limits(NEW.max_attempts, NEW.max_cost, NEW.run_after, NEW.deadline_at);
    END IF;

    IF OLD.status = 'queued' THEN
        needs := public.training_read_needs(NEW.gpu_config, NEW.hyperparameters);
        NEW.need_gpus := needs.gpus;
        NEW.need_gpu_memory_gb := needs.gpu_memory_gb;
        NEW.need_gpu_type := needs.gpu_type;
        NEW.base_model := needs.base_model;
        -- Time alone makes it due by promote_due_jobs only, which wakes: this statement may name nothing that does.
        IF NEW.run_after IS DISTINCT FROM OLD.run_after THEN
            NEW.due := NOT NEW.held AND (NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp());
        END IF;
        IF NEW.dataset_url <> OLD.dataset_url THEN
            named := public.training_name_url(NEW.dataset_url);
            UPDATE public.datasets AS dataset
            SET name = named.file_name, description = named.description, file_name = named.file_name
            WHERE dataset.id = NEW.dataset_id AND dataset.storage_path = 'urls/' || NEW.id;
        END IF;
    END IF;
    RETURN NEW;
END
$$;

-- Where a user's dataset may lie: in the app's own buckets, under his own id. The service role, which imports
-- training files on users' behalf, may point anywhere; the daemon checks again before it signs a URL.
CREATE OR REPLACE FUNCTION public.training_datasets_guard() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
    IF current_user <> 'authenticated' THEN
        RETURN NEW;
    END IF;
    IF TG_OP = 'UPDATE' AND (NEW.user_id, NEW.storage_bucket, NEW.storage_path)
        IS NOT DISTINCT FROM (OLD.user_id, OLD.storage_bucket, OLD.storage_path) THEN
        RETURN NEW;
    END IF;
    -- The row that the job guard makes for a dataset_url; no bucket has this name.
    IF NEW.storage_bucket = 'url' AND NEW.storage_path LIKE 'urls/%' THEN
        RETURN NEW;
    END IF;
    IF coalesce(NEW.storage_bucket, '') NOT IN ('lora-datasets', 'training-files') THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('datasets are not read from the bucket %s', coalesce(NEW.storage_bucket, '(none)')),
            HINT = 'store the file in lora-datasets';
    END IF;
    IF NOT starts_with(NEW.storage_path, NEW.user_id::text || '/') OR NEW.storage_path ~ '(^|/)\.\.?(/|$)' THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'the storage path of a dataset begins with its owner''s id',
            HINT = format('store the file under %s/', NEW.user_id);
    END IF;
    RETURN NEW;
END
$$;

DO $$
BEGIN
    -- One lock for all that follows: no row slips in between the holding of old rows and the guard.
    LOCK TABLE public.training_jobs, public.datasets IN SHARE ROW EXCLUSIVE MODE;
    IF NOT EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = 'public.training_jobs'::regclass AND tgname = 'training_jobs_guard_update'
    ) THEN
        -- Queued before we came: held, until the operator says release_held_jobs(). Somebody else may have run them.
        UPDATE public.training_jobs SET held = true WHERE status = 'queued';
    END IF;
END
$$;

-- Names sort before the app's update_training_jobs_updated_at: ours looks at what the caller sent.
CREATE OR REPLACE TRIGGER training_jobs_guard_insert
    BEFORE INSERT ON public.training_jobs
    FOR EACH ROW EXECUTE FUNCTION public.training_jobs_guard_insert();

CREATE OR REPLACE TRIGGER training_jobs_guard_update
    BEFORE UPDATE ON public.training_jobs
    FOR EACH ROW EXECUTE FUNCTION public.training_jobs_guard_update();

CREATE OR REPLACE TRIGGER training_datasets_guard
    BEFORE INSERT OR UPDATE ON public.datasets
    FOR EACH ROW EXECUTE FUNCTION public.training_datasets_guard();

REVOKE EXECUTE ON FUNCTION
    public.training_jobs_guard_insert(), public.training_jobs_guard_update(), public.training_datasets_guard(),
    public.training_read_needs(jsonb, jsonb),
    public.training_name_url(text),
    public.training_check_limits(integer, numeric, timestamptz, timestamptz)
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION
    public.training_read_needs(jsonb, jsonb),
    public.training_name_url(text),
    public.training_check_limits(integer, numeric, timestamptz, timestamptz)
TO authenticated, service_role, training_daemon;
