-- A job is deployed when an endpoint has answered with its adapter: `deployed_at`, and `deployed_as`, the model's name
-- there; else `deployment_note` says why not. The deliveries of the kind `endpoint` write it, in the transaction that ends
-- them. The app's row in model_artifacts follows: stored, deployed, superseded.

SET LOCAL lock_timeout = '1s';

ALTER TABLE public.training_jobs
    ADD COLUMN IF NOT EXISTS deployed_at timestamptz,
    ADD COLUMN IF NOT EXISTS deployed_as text,
    ADD COLUMN IF NOT EXISTS deployment_note text;

GRANT UPDATE (deployed_at, deployed_as, deployment_note) ON public.training_jobs TO training_daemon;
GRANT UPDATE (status, deployed_at) ON public.model_artifacts TO training_daemon;

-- What a name means at an endpoint: the newest adapter of one owner, who alone may give it another meaning.
-- `superseded` are jobs whose adapters it meant before, until the endpoint has forgotten them.
CREATE TABLE IF NOT EXISTS public.training_served_names (
    endpoint text NOT NULL,
    name text NOT NULL,
    user_id uuid NOT NULL,
    job_id uuid NOT NULL REFERENCES public.training_jobs (id) ON DELETE CASCADE,
    completed_at timestamptz NOT NULL,
    superseded uuid[] NOT NULL DEFAULT '{}',
    taken_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT training_served_names_pkey PRIMARY KEY (endpoint, name)
);

CREATE INDEX IF NOT EXISTS training_served_names_job ON public.training_served_names (job_id);

-- Addresses of the operator's network stand there: not for users.
REVOKE ALL ON public.training_served_names FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT ON public.training_served_names TO service_role;
GRANT SELECT, INSERT, UPDATE ON public.training_served_names TO training_daemon;

ALTER TABLE public.training_served_names ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS trainer_training_daemon_all ON public.training_served_names;
CREATE POLICY trainer_training_daemon_all ON public.training_served_names FOR ALL TO training_daemon
    USING (true) WITH CHECK (true);

-- The ending of a delivery of the kind `endpoint` in the job's row. A fault becomes a line in the story.
CREATE OR REPLACE FUNCTION public.training_deliveries_deployed() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
SET lock_timeout = '2s'
AS $$
DECLARE
    superseded uuid[] := ARRAY(
        SELECT named.id::uuid
        FROM jsonb_array_elements_text(coalesce(NEW.result -> 'superseded', '[]')) AS named (id)
    );
BEGIN
    IF NEW.state = 'done' THEN
        UPDATE public.training_jobs AS job
        SET deployed_at = clock_timestamp(),
            deployed_as = NEW.result ->> 'model',
            deployment_note = NEW.result ->> 'name_refused'
        WHERE job.id = NEW.job_id;
        UPDATE public.training_jobs AS job
        SET deployed_at = NULL,
            deployed_as = NULL,
            deployment_note = format('Superseded by job %s.', NEW.job_id)
        WHERE job.id = ANY (superseded) AND job.user_id = NEW.user_id;
        UPDATE public.training_served_names AS served SET superseded = '{}' WHERE served.job_id = NEW.job_id;
    ELSIF NEW.state = 'failed' THEN
        UPDATE public.training_jobs AS job
        SET deployed_at = NULL,
            deployed_as = NULL,
            deployment_note = concat_ws(' ', NEW.error_message, NEW.error_hint)
        WHERE job.id = NEW.job_id;
    ELSIF NEW.error_message IS NOT NULL THEN
        UPDATE public.training_jobs AS job SET deployment_note = NEW.error_message WHERE job.id = NEW.job_id;
    END IF;
    IF to_regclass('public.model_artifacts') IS NOT NULL AND NEW.state IN ('done', 'failed') THEN
        -- A status of the app's own is left alone.
        UPDATE public.model_artifacts AS model
        SET status = CASE NEW.state WHEN 'done' THEN 'deployed' ELSE 'stored' END,
            deployed_at = CASE NEW.state WHEN 'done' THEN clock_timestamp() END,
            updated_at = clock_timestamp()
        WHERE model.job_id = NEW.job_id AND model.status IN ('stored', 'deployed', 'superseded');
        UPDATE public.model_artifacts AS model
        SET status = 'superseded',
            updated_at = clock_timestamp()
        WHERE model.job_id = ANY (superseded) AND model.user_id = NEW.user_id AND model.status = 'deployed';
    END IF;
    RETURN NULL;
EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    SELECT job.id, job.lease_epoch, 'notice',
        format('How the deployment ended could not be written into the rows: %s.', rtrim(SQLERRM, '.')),
        jsonb_build_object('code', 'side_table_failed', 'table', 'training_jobs', 'sqlstate', SQLSTATE)
    FROM public.training_jobs AS job
    WHERE job.id = NEW.job_id;
    RETURN NULL;
END
$$;

REVOKE EXECUTE ON FUNCTION public.training_deliveries_deployed() FROM PUBLIC, anon, authenticated, service_role;

CREATE OR REPLACE TRIGGER training_deliveries_deployed
    AFTER UPDATE OF state ON public.training_deliveries
    FOR EACH ROW
    WHEN (NEW.kind = 'endpoint' AND NEW.state IS DISTINCT FROM OLD.state AND NEW.state <> 'running')
    EXECUTE FUNCTION public.training_deliveries_deployed();

-- The guard of 20261128000002 again, whole; what is new are the three columns, which only the service writes.
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
    NEW.lease_token := NULL;
    NEW.held := false;
    NEW.last_progress_at := NULL;
    NEW.adapter_path := NULL;
    NEW.adapter_sha256 := NULL;
    NEW.adapter_bytes := NULL;
    NEW.result := NULL;
    NEW.trained_with := NULL;
    NEW.deployed_at := NULL;
    NEW.deployed_as := NULL;
    NEW.deployment_note := NULL;

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
        AND NEW.lease_token IS NOT DISTINCT FROM OLD.lease_token
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
        -- Not that it must change: a host of an older version draws none.
        IF NEW.lease_token IS DISTINCT FROM OLD.lease_token AND NEW.status <> 'initializing' THEN
            RAISE EXCEPTION USING ERRCODE = 'PT409',
                MESSAGE = format('the lease token changes at a claim and never else (%s to %s)', OLD.status, NEW.status);
        END IF;
        IF NEW.status <> 'queued' THEN
            NEW.run_after := NULL;
            NEW.due := false;
            RETURN NEW;
        END IF;
        NEW.due := NOT NEW.held AND (NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp());
        -- A job that names no model goes back without the default of the host that had it, unless that has trained a step:
        -- then its checkpoint and its curve are of that model, whatever the next host's default is. Submitted again by a
        -- person, it begins anew, with the default of the day.
        IF NEW.trained_with IS NOT NULL
            AND (OLD.status IN ('failed', 'cancelled') OR NEW.trained_with -> 'first_step_at' IS NULL)
        THEN
            needs := public.training_read_needs(NEW.gpu_config, NEW.hyperparameters);
            NEW.base_model := needs.base_model;
            NEW.trained_with := NULL;
        END IF;
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
        NEW.lease_token := NULL;
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
        NEW.error_hint, NEW.retry_count, NEW.external_job_id, NEW.attempt, NEW.lease_epoch, NEW.lease_token, NEW.held, NEW.due,
        NEW.need_gpus, NEW.need_gpu_memory_gb, NEW.need_gpu_type, NEW.base_model, NEW.last_progress_at,
        NEW.adapter_path, NEW.adapter_sha256, NEW.adapter_bytes, NEW.result, NEW.trained_with,
        NEW.deployed_at, NEW.deployed_as, NEW.deployment_note)
        IS DISTINCT FROM
       (OLD.id, OLD.user_id, OLD.client_job_id, OLD.created_at, OLD.queued_at, OLD.started_at, OLD.completed_at,
        OLD.estimated_completion_at, OLD.current_stage, OLD.progress, OLD.current_epoch, OLD.current_step,
        OLD.current_metrics, OLD.current_cost, OLD.final_cost, OLD.error_message, OLD.error_stack, OLD.error_code,
        OLD.error_hint, OLD.retry_count, OLD.external_job_id, OLD.attempt, OLD.lease_epoch, OLD.lease_token, OLD.held, OLD.due,
        OLD.need_gpus, OLD.need_gpu_memory_gb, OLD.need_gpu_type, OLD.base_model, OLD.last_progress_at,
        OLD.adapter_path, OLD.adapter_sha256, OLD.adapter_bytes, OLD.result, OLD.trained_with,
        OLD.deployed_at, OLD.deployed_as, OLD.deployment_note)
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
        -- Another spec or other data are another run: what an earlier attempt has trained with binds it no more.
        IF OLD.trained_with IS NULL
            OR (NEW.hyperparameters, NEW.dataset_id, NEW.dataset_url)
                IS DISTINCT FROM (OLD.hyperparameters, OLD.dataset_id, OLD.dataset_url)
        THEN
            NEW.base_model := needs.base_model;
            NEW.trained_with := NULL;
        END IF;
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
