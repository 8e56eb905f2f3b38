-- The artifact says what it was trained with: base model, revision and every resolved hyperparameter.

SET LOCAL lock_timeout = '1s';

-- The function of 20261122000007 again, whole; what is new are model_revision and trained_with in the configuration, and
-- that what the story says of a fault is a sentence.
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
            'model_revision', NEW.trained_with -> 'model_revision',
            'preset_id', NEW.preset_id,
            -- What was asked for; all that was used, whoever chose it, is in trained_with.
            'hyperparameters', NEW.hyperparameters,
            'gpu_config', NEW.gpu_config,
            'trained_with', NEW.trained_with,
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
    VALUES (NEW.id, NEW.lease_epoch, 'notice', format('The row in model_artifacts could not be written: %s.', rtrim(SQLERRM, '.')),
        jsonb_build_object('code', 'side_table_failed', 'table', 'model_artifacts', 'sqlstate', SQLSTATE));
    RETURN NEW;
END
$$;
