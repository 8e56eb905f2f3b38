-- Records the first report of a pod's daemon. No row means that it was recorded before.
WITH reported AS (
    UPDATE training_pods AS pod
    SET reported_at = %(now)s
    WHERE pod.id = %(id)s
      AND pod.reported_at IS NULL
      AND pod.ended_at IS NULL
    RETURNING pod.id, pod.pod, pod.gpu_type
),
told AS (
    INSERT INTO training_fleet_decisions (at, decision, pod_row, pod, gpu_type, reason)
    SELECT %(now)s, 'report', reported.id, reported.pod, reported.gpu_type, %(reason)s
    FROM reported
)
SELECT reported.id FROM reported
