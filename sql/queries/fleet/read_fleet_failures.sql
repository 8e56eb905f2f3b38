-- Reads for each GPU type how many pods in a row ended without ever reporting in, and when the last one did.
-- No row means that none failed recently.
SELECT failed.gpu_type, count(*) AS failures, max(failed.ended_at) AS last_at
FROM training_pods AS failed
WHERE failed.asked_at > %(since)s
  AND failed.ended_at IS NOT NULL
  AND failed.reported_at IS NULL
  AND NOT EXISTS (
      SELECT FROM training_pods AS good
      WHERE good.gpu_type = failed.gpu_type AND good.reported_at > failed.ended_at
  )
GROUP BY failed.gpu_type
