-- The app's own tables, exactly as the app has them, where they do not exist yet.
-- Over the app's living tables this file changes nothing: we add, we never drop, rename or retype.

SET LOCAL lock_timeout = '1s';

CREATE TABLE IF NOT EXISTS public.datasets (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
    name varchar(200),
    description text,
    format varchar(50) DEFAULT 'brightrun_lora_v4',
    status varchar(50) DEFAULT 'uploading',
    storage_bucket varchar(100) DEFAULT 'lora-datasets',
    storage_path text NOT NULL UNIQUE,
    file_name varchar(500),
    file_size bigint,
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
    deleted_at timestamptz
);

CREATE TABLE IF NOT EXISTS public.training_jobs (
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

CREATE INDEX IF NOT EXISTS idx_training_jobs_user_id ON public.training_jobs (user_id);
CREATE INDEX IF NOT EXISTS idx_training_jobs_status ON public.training_jobs (status);
CREATE INDEX IF NOT EXISTS idx_training_jobs_dataset_id ON public.training_jobs (dataset_id);

CREATE TABLE IF NOT EXISTS public.metrics_points (
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

CREATE TABLE IF NOT EXISTS public.model_artifacts (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
    job_id uuid NOT NULL UNIQUE REFERENCES public.training_jobs (id) ON DELETE CASCADE,
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

CREATE TABLE IF NOT EXISTS public.cost_records (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
    job_id uuid REFERENCES public.training_jobs (id) ON DELETE SET NULL,
    cost_type varchar(50) NOT NULL,
    amount numeric(10, 2) NOT NULL,
    details jsonb,
    billing_period date NOT NULL,
    recorded_at timestamptz DEFAULT now()
);

CREATE TABLE IF NOT EXISTS public.notifications (
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

CREATE INDEX IF NOT EXISTS idx_metrics_points_job_id ON public.metrics_points (job_id);
CREATE INDEX IF NOT EXISTS idx_cost_records_job_id ON public.cost_records (job_id);
CREATE INDEX IF NOT EXISTS idx_notifications_user_id ON public.notifications (user_id);

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
    END IF;

    -- The app's trigger keeps updated_at; its function is left as it is where it exists.
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
    IF NOT EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = 'public.training_jobs'::regclass AND tgname = 'update_training_jobs_updated_at'
    ) THEN
        CREATE TRIGGER update_training_jobs_updated_at
            BEFORE UPDATE ON public.training_jobs
            FOR EACH ROW EXECUTE FUNCTION public.update_updated_at_column();
    END IF;
END
$$;
