-- Reads the speed and cost of the last completed jobs of a base model, the basis of an estimate.
-- Always one row; jobs = 0 means that there is no basis.
SELECT
    count(*)::int AS jobs,
    (sum(past.tokens) / nullif(sum(past.training_seconds), 0))::float8 AS tokens_per_second,
    avg(greatest(past.run_seconds - past.training_seconds, 0))::float8 AS other_seconds,
    (sum(past.cost) FILTER (WHERE past.cost > 0) / nullif(sum(past.run_seconds) FILTER (WHERE past.cost > 0), 0) * 3600)::float8
        AS dollars_per_hour
FROM (
    SELECT
        (job.result -> 'summary' ->> 'tokens')::float8 AS tokens,
        (job.result -> 'summary' ->> 'training_seconds')::float8 AS training_seconds,
        extract(epoch FROM job.completed_at - job.started_at)::float8 AS run_seconds,
        job.final_cost::float8 AS cost
    FROM public.training_jobs AS job
    WHERE job.status = 'completed'
      -- Without a name: those that named none either, and got the default.
      AND CASE
          WHEN %(model)s::text IS NULL THEN (public.training_read_needs(job.gpu_config, job.hyperparameters)).base_model IS NULL
          ELSE job.base_model = %(model)s::text
      END
      AND jsonb_typeof(job.result -> 'summary' -> 'tokens') = 'number'
      AND jsonb_typeof(job.result -> 'summary' -> 'training_seconds') = 'number'
    ORDER BY job.completed_at DESC
    LIMIT 20
) AS past
