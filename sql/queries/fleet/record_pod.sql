-- Records that RunPod created the pod. No row means that this was recorded before, or that its row has ended.
WITH made AS (
    UPDATE training_pods AS pod
    SET pod = %(pod)s,
        price_per_hour = %(price_per_hour)s
    WHERE pod.id = %(id)s
      AND pod.pod IS NULL
      AND pod.ended_at IS NULL
    RETURNING pod.id, pod.gpu_type
),
told AS (
    INSERT INTO training_fleet_decisions (at, decision, pod_row, pod, gpu_type, reason)
    SELECT %(now)s, %(decision)s, made.id, %(pod)s, made.gpu_type, %(reason)s
    FROM made
)
SELECT made.id FROM made
