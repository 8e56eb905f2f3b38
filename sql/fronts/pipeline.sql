-- The app's table pipeline_training_jobs as a front of the queue: a row inserted there becomes a job of training_jobs with
-- the same id, and each write to the job is copied back to the row, in the same transaction. There is one queue; nothing
-- polls. Applied by `brightrun-trainer migrate --front pipeline`; or copied to supabase/migrations, for `supabase db push`.
-- front of: pipeline_training_jobs, pipeline_training_metrics
--
-- A row is ours when its runpod_job_id is its own id: an older dispatcher takes rows that have none. Rows that were there
-- before are left as they are; release_pipeline_jobs() takes over those that still wait.
--
-- The functions belong to whoever installs this file, who owns the app's table. The daemon's role gets no right on it: its
-- password lies on rented hosts.

SET LOCAL lock_timeout = '1s';

-- What is missing in the app's tables, with what to do. From the catalogue, which every role may read.
CREATE OR REPLACE FUNCTION public.training_pipeline_faults() RETURNS SETOF text
LANGUAGE sql STABLE
SET search_path = ''
AS $$
    WITH needed (relation, field, kind) AS (
        VALUES
            ('pipeline_training_jobs', 'id', 'uuid'),
            ('pipeline_training_jobs', 'user_id', 'uuid'),
            ('pipeline_training_jobs', 'status', 'text'),
            ('pipeline_training_jobs', 'dataset_id', 'uuid'),
            ('pipeline_training_jobs', 'dataset_file_path', 'text'),
            ('pipeline_training_jobs', 'learning_rate', 'double precision'),
            ('pipeline_training_jobs', 'batch_size', 'integer'),
            ('pipeline_training_jobs', 'epochs', 'integer'),
            ('pipeline_training_jobs', 'rank', 'integer'),
            ('pipeline_training_jobs', 'alpha', 'integer'),
            ('pipeline_training_jobs', 'dropout', 'double precision'),
            ('pipeline_training_jobs', 'progress', 'integer'),
            ('pipeline_training_jobs', 'current_epoch', 'integer'),
            ('pipeline_training_jobs', 'current_step', 'integer'),
            ('pipeline_training_jobs', 'total_steps', 'integer'),
            ('pipeline_training_jobs', 'current_loss', 'double precision'),
            ('pipeline_training_jobs', 'current_learning_rate', 'double precision'),
            ('pipeline_training_jobs', 'tokens_per_second', 'double precision'),
            ('pipeline_training_jobs', 'runpod_job_id', 'text'),
            ('pipeline_training_jobs', 'final_loss', 'double precision'),
            ('pipeline_training_jobs', 'training_time_seconds', 'integer'),
            ('pipeline_training_jobs', 'adapter_file_path', 'text'),
            ('pipeline_training_jobs', 'adapter_status', 'text'),
            ('pipeline_training_jobs', 'actual_cost', 'numeric(10,2)'),
            ('pipeline_training_jobs', 'started_at', 'timestamptz'),
            ('pipeline_training_jobs', 'completed_at', 'timestamptz'),
            ('pipeline_training_jobs', 'updated_at', 'timestamptz'),
            ('pipeline_training_jobs', 'error_message', 'text'),
            ('pipeline_training_jobs', 'error_details', 'jsonb'),
            ('pipeline_training_metrics', 'job_id', 'uuid'),
            ('pipeline_training_metrics', 'metric_id', 'text'),
            ('pipeline_training_metrics', 'metric_name', 'text'),
            ('pipeline_training_metrics', 'metric_level', 'text'),
            ('pipeline_training_metrics', 'value', 'double precision'),
            ('pipeline_training_metrics', 'unit', 'text'),
            ('pipeline_training_metrics', 'step_number', 'integer'),
            ('pipeline_training_metrics', 'epoch_number', 'integer'),
            ('pipeline_training_metrics', 'measured_at', 'timestamptz')
    )
    SELECT DISTINCT needed.relation || ' is missing: apply the app''s own migration that makes it'
    FROM needed
    WHERE to_regclass('public.' || needed.relation) IS NULL
    UNION ALL
    SELECT format('%1$s.%2$s is missing: ALTER TABLE %1$s ADD COLUMN %2$s %3$s', needed.relation, needed.field, needed.kind)
    FROM needed
    WHERE to_regclass('public.' || needed.relation) IS NOT NULL
      AND NOT EXISTS (
          SELECT
          FROM pg_catalog.pg_attribute AS attribute
          WHERE attribute.attrelid = to_regclass('public.' || needed.relation)
            AND attribute.attname = needed.field
            AND NOT attribute.attisdropped
      )
$$;

DO $$
DECLARE
    faults text;
BEGIN
    IF to_regprocedure('public.training_is_object_path(text)') IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '55000',
            MESSAGE = 'the front pipeline comes after the tables of the trainer',
            HINT = 'apply sql/migrations first';
    END IF;
    SELECT string_agg(fault, '; ') INTO faults FROM public.training_pipeline_faults() AS fault;
    IF faults IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '55000',
            MESSAGE = 'the front pipeline does not fit the app''s tables: ' || faults,
            HINT = 'then install the front again';
    END IF;
END
$$;

-- Which table a job came from; null for one that was inserted into training_jobs itself.
ALTER TABLE public.training_jobs ADD COLUMN IF NOT EXISTS front text;

-- The fronts that are installed. The app's pages name no base model: this one is trained.
CREATE TABLE IF NOT EXISTS public.training_fronts (
    front text PRIMARY KEY,
    base_model text
);
INSERT INTO public.training_fronts (front, base_model)
VALUES ('pipeline', 'mistralai/Mistral-7B-Instruct-v0.2')
ON CONFLICT (front) DO NOTHING;

-- Jobs whose row of a front could not be written (a lock, a constraint of the app's). Written again at the next chance.
CREATE TABLE IF NOT EXISTS public.training_front_lags (
    job_id uuid PRIMARY KEY REFERENCES public.training_jobs (id) ON DELETE CASCADE,
    front text NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    tried_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

REVOKE ALL ON public.training_fronts, public.training_front_lags FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT ON public.training_fronts, public.training_front_lags TO service_role, training_daemon;
ALTER TABLE public.training_fronts ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_front_lags ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS trainer_training_daemon_select ON public.training_fronts;
CREATE POLICY trainer_training_daemon_select ON public.training_fronts FOR SELECT TO training_daemon USING (true);
DROP POLICY IF EXISTS trainer_training_daemon_select ON public.training_front_lags;
CREATE POLICY trainer_training_daemon_select ON public.training_front_lags FOR SELECT TO training_daemon USING (true);

-- Only a front's own trigger says that a job belongs to it. From anybody else the word is not taken.
CREATE OR REPLACE FUNCTION public.training_jobs_guard_front() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        NEW.front := OLD.front;
    ELSE
        NEW.front := NULL;
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER training_jobs_guard_front_insert
    BEFORE INSERT ON public.training_jobs
    FOR EACH ROW
    WHEN (NEW.front IS NOT NULL AND current_user IN ('anon', 'authenticated', 'service_role', 'training_daemon'))
    EXECUTE FUNCTION public.training_jobs_guard_front();

CREATE OR REPLACE TRIGGER training_jobs_guard_front_update
    BEFORE UPDATE OF front ON public.training_jobs
    FOR EACH ROW
    WHEN (current_user IN ('anon', 'authenticated', 'service_role', 'training_daemon'))
    EXECUTE FUNCTION public.training_jobs_guard_front();

-- From the row to the job -------------------------------------------------------------------------------------------

-- Runs as the caller, so that current_user tells who inserts.
CREATE OR REPLACE FUNCTION public.training_pipeline_guard_insert() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
    IF current_user IN ('anon', 'authenticated') THEN
        IF coalesce(NEW.status, 'pending') NOT IN ('pending', 'queued') THEN
            -- An upsert comes by here before it meets its row; the update asks what may change.
            IF EXISTS (SELECT FROM public.pipeline_training_jobs AS front WHERE front.id = NEW.id) THEN
                RETURN NEW;
            END IF;
            RAISE EXCEPTION USING ERRCODE = 'PT409',
                MESSAGE = format('a job is inserted as pending or queued, not as %s', NEW.status),
                HINT = 'leave status out: the trainer moves the job';
        END IF;
        -- The app's policy says the same. The job is made past the policies of training_jobs, so it is asked here as well.
        IF NEW.user_id::text IS DISTINCT FROM coalesce(
            nullif(current_setting('request.jwt.claim.sub', true), ''),
            nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
        ) THEN
            RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'a job is inserted for yourself only',
                HINT = 'set user_id to your own id';
        END IF;
    ELSIF coalesce(NEW.status, 'pending') NOT IN ('pending', 'queued') OR NEW.runpod_job_id IS NOT NULL THEN
        -- The app's server writes down what ran elsewhere.
        RETURN NEW;
    END IF;
    -- By name, through JSON: a column that the app has dropped breaks no insert.
    NEW := jsonb_populate_record(NEW, jsonb_build_object(
        'status', 'queued', 'runpod_job_id', NEW.id, 'progress', 0, 'current_epoch', 0, 'current_step', 0,
        'current_loss', NULL, 'current_learning_rate', NULL, 'tokens_per_second', NULL, 'runpod_endpoint_id', NULL,
        'final_loss', NULL, 'training_time_seconds', NULL, 'adapter_file_path', NULL, 'adapter_download_url', NULL,
        'adapter_status', NULL, 'actual_cost', NULL, 'created_at', clock_timestamp(), 'started_at', NULL,
        'completed_at', NULL, 'error_message', NULL, 'error_details', NULL
    ));
    RETURN NEW;
END
$$;

-- The datasets row of the file that a row names: found, or made. dataset_file_path counts before dataset_id, because the
-- app's pages train on that file. Never another user's file, whoever inserted the row.
CREATE OR REPLACE FUNCTION public.training_pipeline_dataset(wish jsonb) RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = ''
AS $$
DECLARE
    owner_id uuid := (wish ->> 'user_id')::uuid;
    file_path text := nullif(btrim(wish ->> 'dataset_file_path'), '');
    named record;
    chosen uuid;
BEGIN
    SELECT dataset.id, dataset.storage_path INTO named
    FROM public.datasets AS dataset
    WHERE dataset.id = (wish ->> 'dataset_id')::uuid AND dataset.user_id = owner_id;
    IF named.id IS NULL AND wish ->> 'dataset_id' IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'this dataset is not yours',
            HINT = 'use the id of a row of datasets that you own';
    END IF;
    IF file_path IS NULL OR file_path = named.storage_path THEN
        IF named.id IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = '23502', MESSAGE = 'a job needs a dataset',
                HINT = 'set dataset_id, or dataset_file_path to the path of the file in the bucket training-files';
        END IF;
        RETURN named.id;
    END IF;

    SELECT dataset.id INTO chosen
    FROM public.datasets AS dataset
    WHERE dataset.storage_path = file_path AND dataset.user_id = owner_id;
    IF FOUND THEN
        RETURN chosen;
    END IF;
    -- The rule of the guard of `datasets`, here for every role: the app's server may repeat what a user has sent.
    IF NOT public.training_is_object_path(file_path)
        OR NOT (starts_with(file_path, owner_id || '/') OR public.training_owns_file(owner_id, file_path))
    THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('the file %s in the bucket training-files is not yours', file_path),
            HINT = format('use a file under %s/, or one of a row of training_files that you have created', owner_id);
    END IF;
    INSERT INTO public.datasets AS dataset
        (user_id, name, storage_bucket, storage_path, file_name, file_size, status, training_ready)
    VALUES (
        owner_id,
        left(coalesce(nullif(btrim(wish ->> 'dataset_name'), ''), regexp_replace(file_path, '^.*/', '')), 200),
        'training-files', file_path, left(regexp_replace(file_path, '^.*/', ''), 200), 0, 'ready', true
    )
    ON CONFLICT (storage_path) DO NOTHING
    RETURNING dataset.id INTO chosen;
    IF chosen IS NULL THEN
        -- Somebody was faster: the same user in another session, or a stranger.
        SELECT dataset.id INTO chosen
        FROM public.datasets AS dataset
        WHERE dataset.storage_path = file_path AND dataset.user_id = owner_id;
    END IF;
    IF chosen IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('the file %s is the dataset of another user', file_path), HINT = 'use your own file';
    END IF;
    RETURN chosen;
END
$$;

-- Makes the job of a row, with the id of the row.
CREATE OR REPLACE FUNCTION public.training_pipeline_submit(wish jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = ''
AS $$
BEGIN
    IF wish ->> 'user_id' IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '23502', MESSAGE = 'a job needs an owner', HINT = 'set user_id';
    END IF;
    INSERT INTO public.training_jobs (
        id, user_id, dataset_id, hyperparameters, gpu_config, total_epochs, total_steps, estimated_total_cost, front
    )
    VALUES (
        (wish ->> 'id')::uuid,
        (wish ->> 'user_id')::uuid,
        public.training_pipeline_dataset(wish),
        jsonb_strip_nulls(jsonb_build_object(
            'base_model', (SELECT front.base_model FROM public.training_fronts AS front WHERE front.front = 'pipeline'),
            'learning_rate', wish -> 'learning_rate',
            'batch_size', wish -> 'batch_size',
            'num_epochs', wish -> 'epochs',
            'lora_rank', wish -> 'rank',
            'lora_alpha', wish -> 'alpha',
            'lora_dropout', wish -> 'dropout'
        )),
        jsonb_strip_nulls(jsonb_build_object('gpu_type', wish -> 'gpu_type', 'num_gpus', wish -> 'gpu_count')),
        coalesce((wish ->> 'epochs')::integer, 0),
        (wish ->> 'total_steps')::integer,
        coalesce((wish ->> 'estimated_cost')::numeric, 0),
        'pipeline'
    );
EXCEPTION WHEN unique_violation THEN
    RAISE EXCEPTION USING ERRCODE = 'PT409', MESSAGE = format('the id %s is taken', wish ->> 'id'),
        HINT = 'leave id out: the database chooses one';
END
$$;

CREATE OR REPLACE FUNCTION public.training_pipeline_insert() RETURNS trigger
LANGUAGE plpgsql
-- Runs as its owner: whose dataset it may be is checked above, for every role.
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
    PERFORM public.training_pipeline_submit(to_jsonb(NEW));
    RETURN NULL;
END
$$;

-- From the job to the row -------------------------------------------------------------------------------------------

-- Writes what has become of a job into its row, if anything has changed there.
CREATE OR REPLACE FUNCTION public.training_pipeline_write(job public.training_jobs) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = ''
AS $$
DECLARE
    metrics jsonb := job.current_metrics;
    summary jsonb := job.result -> 'summary';
    final_loss jsonb := coalesce(summary -> 'final_loss', summary -> 'final_training_loss');
    ended boolean := job.status IN ('completed', 'failed', 'cancelled');
BEGIN
    UPDATE public.pipeline_training_jobs AS front
    SET status = now.status,
        progress = now.progress,
        current_epoch = now.current_epoch,
        current_step = now.current_step,
        total_steps = now.total_steps,
        current_loss = now.current_loss,
        current_learning_rate = now.current_learning_rate,
        tokens_per_second = now.tokens_per_second,
        final_loss = now.final_loss,
        training_time_seconds = now.training_time_seconds,
        adapter_file_path = now.adapter_file_path,
        -- What comes after 'stored' is written by the app's deployment.
        adapter_status = CASE WHEN now.status = 'completed' THEN coalesce(front.adapter_status, 'stored') END,
        actual_cost = now.actual_cost,
        started_at = now.started_at,
        completed_at = now.completed_at,
        error_message = now.error_message,
        error_details = now.error_details,
        updated_at = clock_timestamp()
    FROM (
        SELECT
            job.status AS status,
            trunc(job.progress)::integer AS progress,
            job.current_epoch AS current_epoch,
            job.current_step AS current_step,
            job.total_steps AS total_steps,
            CASE jsonb_typeof(metrics -> 'training_loss') WHEN 'number' THEN (metrics ->> 'training_loss')::double precision END
                AS current_loss,
            CASE jsonb_typeof(metrics -> 'learning_rate') WHEN 'number' THEN (metrics ->> 'learning_rate')::double precision END
                AS current_learning_rate,
            CASE jsonb_typeof(metrics -> 'throughput') WHEN 'number' THEN (metrics ->> 'throughput')::double precision END
                AS tokens_per_second,
            CASE jsonb_typeof(final_loss) WHEN 'number' THEN (final_loss #>> '{}')::double precision END AS final_loss,
            CASE WHEN ended THEN extract(epoch FROM job.completed_at - job.started_at)::integer END AS training_time_seconds,
            CASE WHEN job.status = 'completed' THEN job.adapter_path END AS adapter_file_path,
            coalesce(job.final_cost, nullif(job.current_cost, 0)) AS actual_cost,
            job.started_at AS started_at,
            job.completed_at AS completed_at,
            -- The app's page shows this text alone.
            CASE
                WHEN strpos(job.error_message, job.error_hint) > 0 THEN job.error_message
                ELSE nullif(concat_ws(' ', job.error_message, job.error_hint), '')
            END AS error_message,
            CASE
                WHEN job.error_code IS NOT NULL
                THEN jsonb_strip_nulls(jsonb_build_object(
                    'code', job.error_code, 'hint', job.error_hint, 'attempt', job.attempt, 'max_attempts', job.max_attempts
                ))
            END AS error_details
    ) AS now
    WHERE front.id = job.id
      AND front.user_id = job.user_id
      AND (
          front.status, front.progress, front.current_epoch, front.current_step, front.total_steps, front.current_loss,
          front.current_learning_rate, front.tokens_per_second, front.final_loss, front.training_time_seconds,
          front.adapter_file_path, front.actual_cost, front.started_at, front.completed_at, front.error_message,
          front.error_details
      ) IS DISTINCT FROM (
          now.status, now.progress, now.current_epoch, now.current_step, now.total_steps, now.current_loss,
          now.current_learning_rate, now.tokens_per_second, now.final_loss, now.training_time_seconds,
          now.adapter_file_path, now.actual_cost, now.started_at, now.completed_at, now.error_message,
          now.error_details
      );
END
$$;

-- Copies each write to a job into its row. A fault in the app's table never breaks our own write (a lease, an ending): it
-- is told once in the job's story, and the row is written again later.
--
-- Whoever cancels by the row has locked it and waits for the job; we have locked the job and wait for the row. So we give
-- up first, before Postgres looks for deadlocks (after a second): the cancel then writes the row itself.
CREATE OR REPLACE FUNCTION public.training_pipeline_mirror() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = ''
SET lock_timeout = '700ms'
AS $$
BEGIN
    BEGIN
        PERFORM public.training_pipeline_write(NEW);
        -- What the app checks at the end of the transaction only is checked here, where it can be caught. A cancel is part
        -- of the app's own transaction, whose constraints are its own business.
        IF NEW.status <> 'cancelled' THEN
            SET CONSTRAINTS ALL IMMEDIATE;
        END IF;
        DELETE FROM public.training_front_lags AS lag WHERE lag.job_id = NEW.id;
    EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
        INSERT INTO public.training_front_lags (job_id, front, reason)
        VALUES (NEW.id, 'pipeline', SQLERRM)
        ON CONFLICT (job_id) DO NOTHING;
        -- A lock in the way of some progress is no news: more follows in a second.
        IF FOUND AND (SQLSTATE <> '55P03' OR NEW.status IS DISTINCT FROM OLD.status) THEN
            INSERT INTO public.training_events (job_id, epoch, kind, message, data)
            VALUES (NEW.id, NEW.lease_epoch, 'notice',
                format('The row in pipeline_training_jobs could not be written: %s.', rtrim(SQLERRM, '.')),
                jsonb_build_object('code', 'front_failed', 'table', 'pipeline_training_jobs', 'sqlstate', SQLSTATE));
        END IF;
        RETURN NULL;
    END;
    IF NEW.status IS DISTINCT FROM OLD.status THEN
        PERFORM public.training_pipeline_catch_up(3);
    END IF;
    RETURN NULL;
END
$$;

-- Writes rows again that could not be written, the longest untried first. Returns how many are now right. It waits for
-- nobody: a job that somebody else is about to write is left to him, and its row is written then.
CREATE OR REPLACE FUNCTION public.training_pipeline_catch_up(most integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = ''
SET lock_timeout = '20ms'
AS $$
DECLARE
    late uuid;
    job public.training_jobs;
    written integer := 0;
BEGIN
    FOR late IN
        SELECT lag.job_id
        FROM public.training_front_lags AS lag
        WHERE lag.front = 'pipeline'
        ORDER BY lag.tried_at
        LIMIT most
    LOOP
        BEGIN
            SELECT * INTO job FROM public.training_jobs AS found WHERE found.id = late FOR NO KEY UPDATE SKIP LOCKED;
            IF FOUND THEN
                PERFORM public.training_pipeline_write(job);
                DELETE FROM public.training_front_lags AS lag WHERE lag.job_id = late;
                written := written + 1;
            END IF;
        EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
            -- Told once already, and still in the list: behind the others.
            UPDATE public.training_front_lags AS lag SET tried_at = clock_timestamp() WHERE lag.job_id = late;
        END;
    END LOOP;
    RETURN written;
END
$$;

-- The app's curves: a row a metric, for each point of ours and thinned as ours are. For each row and not for each
-- statement: points come one by one, and a batch fires two triggers of statements, for its inserts and its updates.
CREATE OR REPLACE FUNCTION public.training_pipeline_measure() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = ''
SET lock_timeout = '700ms'
AS $$
DECLARE
    its_job uuid;
    its_epoch bigint;
BEGIN
    IF TG_OP = 'DELETE' THEN
        its_job := OLD.job_id;
    ELSE
        its_job := NEW.job_id;
    END IF;
    SELECT job.lease_epoch INTO its_epoch FROM public.training_jobs AS job WHERE job.id = its_job AND job.front = 'pipeline';
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    BEGIN
        IF TG_OP <> 'INSERT' THEN
            DELETE FROM public.pipeline_training_metrics AS metric
            WHERE metric.job_id = OLD.job_id AND metric.step_number = OLD.step AND metric.metric_level = 'universal';
        END IF;
        IF TG_OP <> 'DELETE' THEN
            INSERT INTO public.pipeline_training_metrics
                (job_id, metric_id, metric_name, metric_level, value, unit, step_number, epoch_number, measured_at)
            SELECT
                NEW.job_id, metric.name, metric.name, 'universal', metric.value, metric.unit, NEW.step, NEW.epoch,
                NEW.timestamp
            FROM (
                VALUES
                    ('training_loss', NEW.training_loss, NULL),
                    ('validation_loss', NEW.validation_loss, NULL),
                    ('learning_rate', NEW.learning_rate, NULL),
                    ('gradient_norm', NEW.gradient_norm, NULL),
                    ('tokens_per_second', NEW.throughput, 'tokens/s'),
                    ('gpu_utilization', NEW.gpu_utilization, '%')
            ) AS metric (name, value, unit)
            WHERE metric.value IS NOT NULL;
        END IF;
        SET CONSTRAINTS ALL IMMEDIATE;
    EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
        INSERT INTO public.training_events (job_id, epoch, kind, message, data)
        SELECT its_job, its_epoch, 'notice',
            format('The rows in pipeline_training_metrics could not be written: %s.', rtrim(SQLERRM, '.')),
            jsonb_build_object('code', 'front_failed', 'table', 'pipeline_training_metrics', 'sqlstate', SQLSTATE)
        WHERE NOT EXISTS (
            SELECT
            FROM public.training_events AS event
            WHERE event.job_id = its_job AND event.data ->> 'table' = 'pipeline_training_metrics'
        );
    END;
    RETURN NULL;
END
$$;

-- Changes by the app ------------------------------------------------------------------------------------------------

-- Users may update their rows, and the app's pages send whole rows back: what is not theirs to change stays as it is,
-- without an error. What matters of their updates is the cancel. The app's server writes what follows after a training
-- (the deployment) and, freely, into rows that are not ours; an older dispatcher that believes to run ours changes nothing.
CREATE OR REPLACE FUNCTION public.training_pipeline_guard_update() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
    ours boolean := OLD.runpod_job_id IS NOT DISTINCT FROM OLD.id::text;
    cancels boolean := NEW.status = 'cancelled' AND OLD.status IS DISTINCT FROM 'cancelled';
    fixed text[] := ARRAY[
        'id', 'user_id', 'status', 'learning_rate', 'batch_size', 'epochs', 'rank', 'alpha', 'dropout', 'dataset_id',
        'dataset_file_path', 'gpu_type', 'gpu_count', 'estimated_cost', 'actual_cost', 'progress', 'current_epoch',
        'current_step', 'total_steps', 'current_loss', 'current_learning_rate', 'tokens_per_second', 'runpod_job_id',
        'final_loss', 'training_time_seconds', 'adapter_file_path', 'created_at', 'started_at', 'completed_at',
        'error_message', 'error_details'
    ];
BEGIN
    IF current_user = 'service_role' THEN
        IF NOT ours THEN
            -- One that an older dispatcher runs. It may not become ours by a word.
            IF NEW.runpod_job_id = NEW.id::text THEN
                NEW.runpod_job_id := OLD.runpod_job_id;
            END IF;
            RETURN NEW;
        END IF;
    ELSE
        fixed := fixed || ARRAY['runpod_endpoint_id', 'adapter_download_url', 'adapter_status'];
    END IF;
    IF cancels AND OLD.status IN ('completed', 'failed') THEN
        RAISE EXCEPTION USING ERRCODE = 'PT409',
            MESSAGE = format('the job is already %s and cannot be cancelled', OLD.status),
            HINT = 'only a waiting or running job can be cancelled';
    END IF;
    NEW := jsonb_populate_record(NEW, (
        SELECT jsonb_object_agg(field.key, field.value)
        FROM jsonb_each(to_jsonb(OLD)) AS field
        WHERE field.key = ANY (fixed)
    ));
    IF cancels THEN
        NEW.status := 'cancelled';
        NEW.completed_at := clock_timestamp();
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION public.training_pipeline_cancel() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    job public.training_jobs;
BEGIN
    UPDATE public.training_jobs AS found
    SET status = 'cancelled'
    WHERE found.id = NEW.id
      AND found.front = 'pipeline'
      AND found.status IN ('queued', 'initializing', 'running');
    IF NOT FOUND THEN
        -- It ended a moment ago, and its ending could not be written while we held the row: then that is what the row says.
        SELECT * INTO job FROM public.training_jobs AS found WHERE found.id = NEW.id AND found.front = 'pipeline';
        IF FOUND THEN
            PERFORM public.training_pipeline_write(job);
        END IF;
    END IF;
    RETURN NULL;
END
$$;

-- A deleted row takes its unfinished job with it: its host stops within seconds. One that has ended stays as it is, because
-- artifacts and costs belong to it; it is no longer a job of the front.
CREATE OR REPLACE FUNCTION public.training_pipeline_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
    DELETE FROM public.training_jobs AS job
    WHERE job.id = OLD.id AND job.front = 'pipeline' AND job.status IN ('queued', 'initializing', 'running');
    IF NOT FOUND THEN
        UPDATE public.training_jobs AS job SET front = NULL WHERE job.id = OLD.id AND job.front = 'pipeline';
    END IF;
    RETURN NULL;
END
$$;

-- A job that was deleted itself: its row must not say "running" for ever.
CREATE OR REPLACE FUNCTION public.training_pipeline_job_deleted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = ''
SET lock_timeout = '700ms'
AS $$
BEGIN
    UPDATE public.pipeline_training_jobs AS front
    SET status = 'cancelled',
        completed_at = clock_timestamp(),
        error_message = 'The job was deleted.',
        updated_at = clock_timestamp()
    WHERE front.id = OLD.id
      AND front.user_id = OLD.user_id
      AND front.status NOT IN ('completed', 'failed', 'cancelled');
    RETURN NULL;
EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
    RAISE WARNING 'job %: its row in pipeline_training_jobs could not be written: %', OLD.id, SQLERRM;
    RETURN NULL;
END
$$;

-- For the operator --------------------------------------------------------------------------------------------------

-- Takes over rows that waited before the front was installed, all or one. Returns how many; one that cannot become a job
-- is warned of and stays as it is. Stop the older dispatcher first.
CREATE OR REPLACE FUNCTION public.release_pipeline_jobs(only_id uuid DEFAULT NULL) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    waiting public.pipeline_training_jobs;
    released integer := 0;
BEGIN
    PERFORM public.training_require_owner(NULL);
    FOR waiting IN
        SELECT *
        FROM public.pipeline_training_jobs AS front
        WHERE front.status IN ('pending', 'queued')
          AND front.runpod_job_id IS NULL
          AND (only_id IS NULL OR front.id = only_id)
        ORDER BY front.id
        FOR UPDATE SKIP LOCKED
    LOOP
        BEGIN
            UPDATE public.pipeline_training_jobs AS front
            SET status = 'queued', runpod_job_id = front.id::text
            WHERE front.id = waiting.id;
            PERFORM public.training_pipeline_submit(to_jsonb(waiting));
            released := released + 1;
        EXCEPTION WHEN OTHERS THEN
            IF left(SQLSTATE, 2) IN ('40', '53', '55', '57', '58') THEN
                RAISE;
            END IF;
            RAISE WARNING 'the row % stays as it is: %', waiting.id, SQLERRM;
        END;
    END LOOP;
    RETURN released;
END
$$;

-- Compares every row with its job and writes those that differ, as after a restore. Returns how many.
CREATE OR REPLACE FUNCTION public.sync_pipeline_jobs() RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    job public.training_jobs;
    written integer;
BEGIN
    PERFORM public.training_require_owner(NULL);
    written := public.training_pipeline_catch_up(1000000);
    FOR job IN
        SELECT found.*
        FROM public.training_jobs AS found
        JOIN public.pipeline_training_jobs AS front ON front.id = found.id
        WHERE found.front = 'pipeline' AND front.status IS DISTINCT FROM found.status
        FOR NO KEY UPDATE OF found SKIP LOCKED
    LOOP
        PERFORM public.training_pipeline_write(job);
        written := written + 1;
    END LOOP;
    RETURN written;
END
$$;

REVOKE EXECUTE ON FUNCTION
    public.training_pipeline_faults(), public.training_jobs_guard_front(), public.training_pipeline_guard_insert(),
    public.training_pipeline_dataset(jsonb),
    public.training_pipeline_submit(jsonb), public.training_pipeline_insert(),
    public.training_pipeline_write(public.training_jobs), public.training_pipeline_mirror(),
    public.training_pipeline_catch_up(integer), public.training_pipeline_measure(),
    public.training_pipeline_guard_update(), public.training_pipeline_cancel(), public.training_pipeline_delete(),
    public.training_pipeline_job_deleted(), public.release_pipeline_jobs(uuid), public.sync_pipeline_jobs()
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_pipeline_faults() TO training_daemon;
GRANT EXECUTE ON FUNCTION public.release_pipeline_jobs(uuid), public.sync_pipeline_jobs() TO service_role, training_daemon;

-- Replacing a step's metrics must not read a whole table.
CREATE INDEX IF NOT EXISTS training_pipeline_metrics_of_step
    ON public.pipeline_training_metrics (job_id, step_number);

-- Names sort before the app's triggers: ours look at what the caller sent.
CREATE OR REPLACE TRIGGER training_pipeline_guard_insert
    BEFORE INSERT ON public.pipeline_training_jobs
    FOR EACH ROW EXECUTE FUNCTION public.training_pipeline_guard_insert();

CREATE OR REPLACE TRIGGER training_pipeline_insert
    AFTER INSERT ON public.pipeline_training_jobs
    FOR EACH ROW
    WHEN (NEW.runpod_job_id = NEW.id::text AND NEW.status = 'queued')
    EXECUTE FUNCTION public.training_pipeline_insert();

-- Not the mirror, which writes as its owner.
CREATE OR REPLACE TRIGGER training_pipeline_guard_update
    BEFORE UPDATE ON public.pipeline_training_jobs
    FOR EACH ROW
    WHEN (current_user IN ('anon', 'authenticated', 'service_role'))
    EXECUTE FUNCTION public.training_pipeline_guard_update();

CREATE OR REPLACE TRIGGER training_pipeline_cancel
    AFTER UPDATE OF status ON public.pipeline_training_jobs
    FOR EACH ROW
    WHEN (NEW.status = 'cancelled' AND OLD.status IS DISTINCT FROM NEW.status AND NEW.runpod_job_id = NEW.id::text)
    EXECUTE FUNCTION public.training_pipeline_cancel();

CREATE OR REPLACE TRIGGER training_pipeline_delete
    AFTER DELETE ON public.pipeline_training_jobs
    FOR EACH ROW
    WHEN (OLD.runpod_job_id = OLD.id::text)
    EXECUTE FUNCTION public.training_pipeline_delete();

CREATE OR REPLACE TRIGGER training_pipeline_mirror
    AFTER UPDATE ON public.training_jobs
    FOR EACH ROW
    WHEN (NEW.front = 'pipeline')
    EXECUTE FUNCTION public.training_pipeline_mirror();

CREATE OR REPLACE TRIGGER training_pipeline_job_deleted
    AFTER DELETE ON public.training_jobs
    FOR EACH ROW
    WHEN (OLD.front = 'pipeline')
    EXECUTE FUNCTION public.training_pipeline_job_deleted();

CREATE OR REPLACE TRIGGER training_pipeline_measure
    AFTER INSERT OR UPDATE OR DELETE ON public.metrics_points
    FOR EACH ROW EXECUTE FUNCTION public.training_pipeline_measure();
