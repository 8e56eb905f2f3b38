-- What the app shows of a finished job: model_artifacts, cost_records, notifications, written in the transaction of
-- the ending. None of them may ever fail a training: a fault becomes a line in the job's story, be it a refusal, a lock
-- that is not given back, or a trigger of the app's that takes longer than a statement may (OTHERS alone does not catch
-- that). What the app checks at the end of the transaction only is checked here, where it can still be caught. Rows that
-- an older dispatcher runs (epoch 0) are left to it.

SET LOCAL lock_timeout = '1s';

-- BEFORE the job's own write, so that artifact_id is part of it. Named to come after the guard.
CREATE OR REPLACE FUNCTION public.training_jobs_results() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
SET lock_timeout = '2s'
AS $$
DECLARE
    summary jsonb := coalesce(NEW.result -> 'summary', '{}');
    seconds double precision := extract(epoch FROM NEW.completed_at - NEW.started_at);
    dataset_name text;
    artifact uuid;
BEGIN
    IF to_regclass('public.model_artifacts') IS NULL THEN
        RETURN NEW;
    END IF;
    SELECT dataset.name INTO dataset_name FROM public.datasets AS dataset WHERE dataset.id = NEW.dataset_id;
    INSERT INTO public.model_artifacts AS model
        (user_id, job_id, dataset_id, name, description, quality_metrics, training_summary, configuration, artifacts)
    VALUES (
        NEW.user_id,
        NEW.id,
        NEW.dataset_id,
        left(concat_ws(' on ', regexp_replace(coalesce(NEW.base_model, 'adapter'), '^.*/', ''), nullif(dataset_name, '')), 200),
        format('LoRA adapter, job %s', NEW.id),
        jsonb_build_object(
            'final_training_loss', summary -> 'final_training_loss',
            'final_validation_loss', summary -> 'final_validation_loss',
            'perplexity', summary -> 'perplexity',
            'loss_reduction_percent', summary -> 'loss_reduction_percent',
            'convergence_quality', summary -> 'convergence_quality',
            'overall_score', summary -> 'overall_score'
        ),
        summary || jsonb_build_object(
            'epochs_completed', coalesce(summary -> 'epochs_completed', to_jsonb(NEW.current_epoch)),
            'total_steps', coalesce(summary -> 'total_steps', to_jsonb(NEW.current_step)),
            'final_loss', coalesce(summary -> 'final_loss', summary -> 'final_training_loss'),
            'training_duration_hours', round((seconds / 3600)::numeric, 4),
            'total_cost', NEW.final_cost
        ),
        jsonb_build_object(
            'base_model', NEW.base_model,
            'preset_id', NEW.preset_id,
            'hyperparameters', NEW.hyperparameters,
            'gpu_config', NEW.gpu_config,
            'adapter_sha256', NEW.adapter_sha256,
            'adapter_bytes', NEW.adapter_bytes
        ),
        coalesce(NEW.result -> 'artifacts', '{}')
    )
    ON CONFLICT (job_id) DO UPDATE
    SET name = excluded.name,
        quality_metrics = excluded.quality_metrics,
        training_summary = excluded.training_summary,
        configuration = excluded.configuration,
        artifacts = excluded.artifacts,
        updated_at = clock_timestamp()
    RETURNING model.id INTO artifact;
    SET CONSTRAINTS ALL IMMEDIATE;
    NEW.artifact_id := artifact;
    RETURN NEW;
EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    VALUES (NEW.id, NEW.lease_epoch, 'notice', 'the row in model_artifacts could not be written: ' || SQLERRM,
        jsonb_build_object('code', 'side_table_failed', 'table', 'model_artifacts', 'sqlstate', SQLSTATE));
    RETURN NEW;
END
$$;

-- After it, called by the announcement: what the job cost, one record for each time that it ended.
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
    VALUES (job.id, job.lease_epoch, 'notice', 'the row in cost_records could not be written: ' || SQLERRM,
        jsonb_build_object('code', 'side_table_failed', 'table', 'cost_records', 'sqlstate', SQLSTATE));
END
$$;

-- What the app's bell shows: the first start, and every ending.
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
            concat_ws(' ', coalesce(job.error_message, 'The training ended with an error.'), job.error_hint),
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
    VALUES (job.id, job.lease_epoch, 'notice', 'the row in notifications could not be written: ' || SQLERRM,
        jsonb_build_object('code', 'side_table_failed', 'table', 'notifications', 'sqlstate', SQLSTATE));
END
$$;

-- A cancelled job's cost is known for good when its child is gone.
CREATE OR REPLACE FUNCTION public.training_jobs_correct_cost() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
    PERFORM public.training_record_cost(NEW, NEW.final_cost);
    RETURN NULL;
END
$$;

REVOKE EXECUTE ON FUNCTION
    public.training_jobs_results(), public.training_jobs_correct_cost(),
    public.training_record_cost(public.training_jobs, numeric), public.training_notify_user(public.training_jobs, text)
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION
    public.training_record_cost(public.training_jobs, numeric), public.training_notify_user(public.training_jobs, text)
TO training_daemon;

CREATE OR REPLACE TRIGGER training_jobs_results
    BEFORE UPDATE OF result ON public.training_jobs
    FOR EACH ROW
    WHEN (NEW.status = 'completed' AND OLD.status IS DISTINCT FROM NEW.status AND NEW.lease_epoch > 0)
    EXECUTE FUNCTION public.training_jobs_results();

CREATE OR REPLACE TRIGGER training_jobs_correct_cost
    AFTER UPDATE OF final_cost ON public.training_jobs
    FOR EACH ROW
    WHEN (
        NEW.status = 'cancelled' AND OLD.status = 'cancelled' AND NEW.lease_epoch > 0
        AND OLD.final_cost IS DISTINCT FROM NEW.final_cost
    )
    EXECUTE FUNCTION public.training_jobs_correct_cost();
