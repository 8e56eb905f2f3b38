-- The daemon of a pod has reported in for the first time. No row means that it had before.
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
