-- The app's own tables, exactly as the app makes them, where they do not exist yet.
-- Over the app's living tables this file changes nothing: we add, we never drop, rename or retype.
--
-- The app's migration may also come after this one. It makes its tables IF NOT EXISTS, but its indexes, triggers,
-- constraints and policies without: one name of ours among those, and it fails whole. So all of these bear names of
-- our own here, and go with a table that we make, never onto one of the app's.

SET LOCAL lock_timeout = '1s';

-- Keeps updated_at. Left as it is where the app has made it.
DO $$
BEGIN
    IF to_regprocedure('public.update_updated_at_column()') IS NULL THEN
        CREATE FUNCTION public.update_updated_at_column() RETURNS trigger
        LANGUAGE plpgsql
        AS $body$
        BEGIN
            NEW.updated_at = now();
            RETURN NEW;
        END
        $body$;
    END IF;
END
$$;

DO $$
BEGIN
    IF to_regclass('public.datasets') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE public.datasets (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
        name varchar(200) NOT NULL,
        description text,
        format varchar(50) DEFAULT 'brightrun_lora_v4',
        status varchar(50) DEFAULT 'uploading',
        storage_bucket varchar(100) DEFAULT 'lora-datasets',
        storage_path text NOT NULL UNIQUE,
        file_name varchar(255) NOT NULL,
        file_size bigint NOT NULL,
        total_training_pairs integer,
        total_validation_pairs integer,
        total_tokens bigint,
        avg_turns_per_conversation numeric(10, 2),
        avg_tokens_per_turn numeric(10, 2),
        training_ready boolean DEFAULT false,
        validated_at timestamptz,
        validation_errors jsonb,
        sample_data jsonb,
        created_at timestamptz DEFAULT now(),
        updated_at timestamptz DEFAULT now(),
        deleted_at timestamptz,
        -- The app's validation writes it, and no migration of the app's makes it.
        error_message text
    );
    CREATE INDEX datasets_of_user ON public.datasets (user_id);
    CREATE INDEX datasets_of_status ON public.datasets (status) WHERE deleted_at IS NULL;
    CREATE INDEX datasets_newest ON public.datasets (created_at DESC);
    CREATE TRIGGER training_datasets_updated_at
        BEFORE UPDATE ON public.datasets
        FOR EACH ROW EXECUTE FUNCTION public.update_updated_at_column();
END
$$;

DO $$
BEGIN
    IF to_regclass('public.training_jobs') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE public.training_jobs (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
        dataset_id uuid NOT NULL REFERENCES public.datasets (id) ON DELETE RESTRICT,
        preset_id varchar(50) NOT NULL,
        hyperparameters jsonb NOT NULL,
        gpu_config jsonb NOT NULL,
        status varchar(50) DEFAULT 'queued',
        current_stage varchar(50) DEFAULT 'queued',
        progress numeric(5, 2) DEFAULT 0,
        current_epoch integer DEFAULT 0,
        total_epochs integer NOT NULL,
        current_step integer DEFAULT 0,
        total_steps integer,
        current_metrics jsonb,
        queued_at timestamptz DEFAULT now(),
        started_at timestamptz,
        completed_at timestamptz,
        estimated_completion_at timestamptz,
        current_cost numeric(10, 2) DEFAULT 0,
        estimated_total_cost numeric(10, 2) NOT NULL,
        final_cost numeric(10, 2),
        error_message text,
        error_stack text,
        retry_count integer DEFAULT 0,
        external_job_id varchar(255) UNIQUE,
        artifact_id uuid,
        created_at timestamptz DEFAULT now(),
        updated_at timestamptz DEFAULT now()
    );
    CREATE INDEX training_jobs_of_user ON public.training_jobs (user_id);
    CREATE INDEX training_jobs_of_status ON public.training_jobs (status);
    CREATE INDEX training_jobs_of_dataset ON public.training_jobs (dataset_id);
    -- Its name sorts after our guard, which looks at what the caller sent.
    CREATE TRIGGER training_jobs_updated_at
        BEFORE UPDATE ON public.training_jobs
        FOR EACH ROW EXECUTE FUNCTION public.update_updated_at_column();
END
$$;

DO $$
BEGIN
    IF to_regclass('public.metrics_points') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE public.metrics_points (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        job_id uuid NOT NULL REFERENCES public.training_jobs (id) ON DELETE CASCADE,
        timestamp timestamptz DEFAULT now(),
        epoch integer NOT NULL,
        step integer NOT NULL,
        training_loss numeric(10, 6) NOT NULL,
        validation_loss numeric(10, 6),
        learning_rate numeric(12, 10) NOT NULL,
        gradient_norm numeric(10, 6),
        throughput numeric(10, 2),
        gpu_utilization numeric(5, 2)
    );
    CREATE INDEX metrics_points_of_job ON public.metrics_points (job_id);
    CREATE INDEX metrics_points_newest ON public.metrics_points (job_id, timestamp DESC);
END
$$;

DO $$
BEGIN
    IF to_regclass('public.model_artifacts') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE public.model_artifacts (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
        job_id uuid NOT NULL UNIQUE REFERENCES public.training_jobs (id) ON DELETE RESTRICT,
        dataset_id uuid NOT NULL REFERENCES public.datasets (id) ON DELETE RESTRICT,
        name varchar(200) NOT NULL,
        version varchar(50) DEFAULT '1.0.0',
        description text,
        status varchar(50) DEFAULT 'stored',
        deployed_at timestamptz,
        quality_metrics jsonb NOT NULL,
        training_summary jsonb NOT NULL,
        configuration jsonb NOT NULL,
        artifacts jsonb NOT NULL,
        parent_model_id uuid REFERENCES public.model_artifacts (id),
        created_at timestamptz DEFAULT now(),
        updated_at timestamptz DEFAULT now(),
        deleted_at timestamptz
    );
    CREATE INDEX model_artifacts_of_user ON public.model_artifacts (user_id);
    CREATE INDEX model_artifacts_of_job ON public.model_artifacts (job_id);
    CREATE TRIGGER training_artifacts_updated_at
        BEFORE UPDATE ON public.model_artifacts
        FOR EACH ROW EXECUTE FUNCTION public.update_updated_at_column();
END
$$;

DO $$
BEGIN
    IF to_regclass('public.cost_records') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE public.cost_records (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
        job_id uuid REFERENCES public.training_jobs (id) ON DELETE SET NULL,
        cost_type varchar(50) NOT NULL,
        amount numeric(10, 2) NOT NULL,
        details jsonb,
        billing_period date NOT NULL,
        recorded_at timestamptz DEFAULT now()
    );
    CREATE INDEX cost_records_of_user ON public.cost_records (user_id);
    CREATE INDEX cost_records_of_period ON public.cost_records (user_id, billing_period DESC);
END
$$;

DO $$
BEGIN
    IF to_regclass('public.notifications') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE public.notifications (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
        type varchar(50) NOT NULL,
        title varchar(200) NOT NULL,
        message text NOT NULL,
        priority varchar(20) DEFAULT 'medium',
        read boolean DEFAULT false,
        action_url text,
        metadata jsonb,
        created_at timestamptz DEFAULT now()
    );
    CREATE INDEX notifications_of_user ON public.notifications (user_id);
    CREATE INDEX notifications_unread ON public.notifications (user_id, read, created_at DESC);
END
$$;

-- Our own statements search these by these columns: an index where the app has none that begins with it.
DO $$
DECLARE
    needed record;
BEGIN
    FOR needed IN
        SELECT * FROM (VALUES
            ('metrics_points', 'job_id', 'metrics_points_of_job'),
            ('cost_records', 'job_id', 'cost_records_of_job'),
            ('notifications', 'user_id', 'notifications_of_user')
        ) AS wanted (relation, field, name)
    LOOP
        IF NOT EXISTS (
            SELECT FROM pg_index AS index
            JOIN pg_attribute AS attribute
                ON attribute.attrelid = index.indrelid AND attribute.attnum = index.indkey[0]
            WHERE index.indrelid = ('public.' || needed.relation)::regclass
              AND attribute.attname = needed.field
              AND index.indpred IS NULL
        ) THEN
            EXECUTE format('CREATE INDEX %I ON public.%I (%I)', needed.name, needed.relation, needed.field);
        END IF;
    END LOOP;
END
$$;

-- The one reference that needs both tables to exist; the app has it under a name of its own.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_constraint
        WHERE conrelid = 'public.training_jobs'::regclass
          AND confrelid = 'public.model_artifacts'::regclass
          AND contype = 'f'
    ) THEN
        ALTER TABLE public.training_jobs
            ADD CONSTRAINT training_jobs_artifact_id_fkey
            FOREIGN KEY (artifact_id) REFERENCES public.model_artifacts (id) NOT VALID;
        IF NOT EXISTS (SELECT FROM public.training_jobs) THEN
            ALTER TABLE public.training_jobs VALIDATE CONSTRAINT training_jobs_artifact_id_fkey;
        END IF;
    END IF;
END
$$;
