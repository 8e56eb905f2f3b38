-- Reads how a job's adapter can be proven and found: the prompts that were answered as samples, the first ones first, and
-- the state of its push to the hub. Always one row.
SELECT
    ARRAY(
        SELECT event.data ->> 'prompt'
        FROM training_events AS event
        WHERE event.job_id = %(job_id)s
          AND event.kind = 'sample'
          AND event.data ->> 'when' = 'after'
        ORDER BY event.id
        LIMIT %(most)s
    ) AS prompts,
    (
        SELECT delivery.state
        FROM training_deliveries AS delivery
        WHERE delivery.job_id = %(job_id)s
          AND delivery.kind = 'hub'
          AND delivery.target = %(repository)s
    ) AS hub_state
