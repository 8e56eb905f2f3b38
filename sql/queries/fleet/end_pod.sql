-- Records that a pod is gone or was never created, and frees its slot. No row means that this was recorded before.
WITH ended AS (
    UPDATE training_pods AS pod
    SET ended_at = %(now)s,
        ending = %(ending)s
    WHERE pod.id = %(id)s
      AND pod.ended_at IS NULL
    RETURNING pod.id, pod.pod, pod.gpu_type
),
told AS (
    INSERT INTO training_fleet_decisions (at, decision, pod_row, pod, gpu_type, reason)
    SELECT %(now)s, 'end', ended.id, ended.pod, ended.gpu_type, %(reason)s
    FROM ended
)
SELECT ended.id FROM ended
