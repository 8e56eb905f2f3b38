-- The hours beside a cost are those that it was charged for: what hosts spent on the job, from each claim to the end of that
-- attempt. From the first start to the end, as it was, they held the time in the queue between two attempts as well, and of
-- a cancelled job not the moments until its trainer had ended.

SET LOCAL lock_timeout = '1s';

-- Seconds that hosts have spent on a job since it was submitted, or submitted again.
CREATE OR REPLACE FUNCTION public.training_held_seconds(job public.training_jobs) RETURNS double precision
LANGUAGE sql VOLATILE
SET search_path = ''
AS $$
    WITH told AS (
        SELECT event.epoch, event.kind, event.at
        FROM public.training_events AS event
        WHERE event.job_id = job.id
          AND event.kind IN (
              'claimed', 'released', 'retrying', 'reaped', 'completed', 'failed', 'stopped'
          )
          AND event.id > coalesce((
              SELECT max(again.id)
              FROM public.training_events AS again
              WHERE again.job_id = job.id AND again.kind = 'resubmitted'
          ), 0)
    ),
    attempts AS (
        SELECT
            min(told.at) FILTER (WHERE told.kind = 'claimed') AS claimed_at,
            coalesce(
                max(told.at) FILTER (WHERE told.kind <> 'claimed'),
                -- Of the attempt that ends now nothing is told yet. A cancelled job is held until its trainer has ended.
                CASE
                    WHEN told.epoch <> job.lease_epoch THEN NULL
                    WHEN EXISTS (SELECT FROM public.training_leases AS lease WHERE lease.job_id = job.id)
                        THEN clock_timestamp()
                    ELSE coalesce(job.completed_at, clock_timestamp())
                END
            ) AS ended_at
        FROM told
        GROUP BY told.epoch
    )
    SELECT coalesce(
        extract(epoch FROM sum(attempts.ended_at - attempts.claimed_at)),
        -- A story that was pruned, or begins after the claim.
        CASE WHEN job.attempt > 0 THEN extract(epoch FROM job.completed_at - job.started_at) END,
        0
    )
    FROM attempts
    WHERE attempts.claimed_at IS NOT NULL
$$;

REVOKE EXECUTE ON FUNCTION public.training_held_seconds(public.training_jobs)
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_held_seconds(public.training_jobs) TO training_daemon;

-- The cost of 20261128000004 again; what is new is its duration.
CREATE OR REPLACE FUNCTION public.training_record_cost(job public.training_jobs, amount numeric) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
SET lock_timeout = '2s'
AS $$
DECLARE
    facts jsonb := jsonb_strip_nulls(jsonb_build_object(
        'gpu_type', coalesce(job.need_gpu_type, job.gpu_config ->> 'gpu_type'),
        'gpu_count', job.need_gpus,
        'duration_hours', round((public.training_held_seconds(job) / 3600)::numeric, 4),
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

-- The artifact of 20261128000006 again; what is new is its duration, which stands beside its cost.
CREATE OR REPLACE FUNCTION public.training_jobs_results() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
SET lock_timeout = '2s'
AS $$
DECLARE
    summary jsonb := coalesce(NEW.result -> 'summary', '{}');
    seconds double precision := public.training_held_seconds(NEW);
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
