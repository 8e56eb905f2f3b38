-- Reads one kind of delivery of a job, with the whole result. No row means that the job did not ask for it.
SELECT
    delivery.state,
    delivery.target,
    delivery.result,
    delivery.error_message,
    delivery.error_hint
FROM public.training_deliveries AS delivery
WHERE delivery.job_id = %(job_id)s
  AND delivery.kind = %(kind)s
ORDER BY delivery.target
LIMIT 1
