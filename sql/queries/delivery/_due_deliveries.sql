-- Included by claim_delivery and has_due_delivery: the open deliveries that this host may take now. The host that
-- trained the adapter need not wait for `next_at` the first time. A busy host leaves a delivery to others for a while.
SELECT delivery.id
FROM training_deliveries AS delivery
JOIN training_jobs AS job ON job.id = delivery.job_id
WHERE delivery.state IN ('waiting', 'running')
  AND (
      delivery.next_at <= statement_timestamp() - %(patience_seconds)s::float8 * interval '1 second'
      OR delivery.state = 'waiting' AND delivery.attempts = 0 AND delivery.first_worker = %(worker_id)s
         AND %(patience_seconds)s::float8 = 0
  )
  AND delivery.kind = ANY (%(kinds)s::text[])
  AND (delivery.storage IS NULL OR delivery.storage = %(storage)s)
  AND (%(models)s::text[] IS NULL OR job.base_model IS NULL OR job.base_model = ANY (%(models)s::text[]))
  AND delivery.id <> ALL (%(skip)s::uuid[])
ORDER BY delivery.next_at, delivery.id
LIMIT 1
