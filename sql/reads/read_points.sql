-- Reads the points of one job's chart after a step, in order.
SELECT
    point.step,
    point.training_loss::float8 AS loss,
    point.validation_loss::float8 AS validation_loss
FROM public.metrics_points AS point
WHERE point.job_id = %(job_id)s
  AND point.step > %(after)s
ORDER BY point.step
