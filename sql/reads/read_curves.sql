-- Reads the charts of some jobs, each thinned to about the wanted number of points: every n-th point, the last, and
-- all with a validation loss. No point is averaged or interpolated. No row means that nothing was measured yet.
SELECT point.job_id::text AS job_id, point.step, point.loss, point.validation_loss
FROM (
    SELECT
        metric.job_id,
        metric.step,
        metric.training_loss::float8 AS loss,
        metric.validation_loss::float8 AS validation_loss,
        row_number() OVER (PARTITION BY metric.job_id ORDER BY metric.step) AS place,
        count(*) OVER (PARTITION BY metric.job_id) AS points
    FROM public.metrics_points AS metric
    WHERE metric.job_id = ANY (%(ids)s::uuid[])
) AS point
WHERE (point.place - 1) %% greatest(ceil(point.points / %(most)s::float8)::bigint, 1) = 0
   OR point.place = point.points
   OR point.validation_loss IS NOT NULL
ORDER BY point.job_id, point.step
