-- Records that the fleet starts a pod; its row takes the first free slot. No row means that every slot is taken.
WITH asked AS (
    INSERT INTO training_pods AS pod (slot, gpu_type, gpu_count, asked_at)
    SELECT free.slot, %(gpu_type)s, %(gpu_count)s, %(now)s
    FROM generate_series(1, %(max_pods)s::int) AS free (slot)
    WHERE NOT EXISTS (SELECT FROM training_pods AS taken WHERE taken.slot = free.slot AND taken.ended_at IS NULL)
    ORDER BY free.slot
    LIMIT 1
    ON CONFLICT (slot) WHERE ended_at IS NULL DO NOTHING
    RETURNING pod.id, pod.gpu_type
),
told AS (
    INSERT INTO training_fleet_decisions (at, decision, pod_row, gpu_type, reason)
    SELECT %(now)s, 'ask', asked.id, asked.gpu_type, %(reason)s
    FROM asked
)
SELECT asked.id FROM asked
