-- Records that the fleet ends a pod, and asks its daemon, if it still responds, to claim nothing more.
-- No row means that this was decided before.
WITH doomed AS (
    UPDATE training_pods AS pod
    SET doomed_at = %(now)s,
        doom = %(doom)s
    WHERE pod.id = %(id)s
      AND pod.doomed_at IS NULL
      AND pod.ended_at IS NULL
    RETURNING pod.id, pod.pod, pod.gpu_type
),
drained AS (
    UPDATE training_workers AS worker
    SET drain = true
    FROM doomed
    WHERE worker.pod = doomed.pod AND worker.state <> 'gone'
),
told AS (
    INSERT INTO training_fleet_decisions (at, decision, pod_row, pod, gpu_type, reason)
    SELECT %(now)s, 'terminate', doomed.id, doomed.pod, doomed.gpu_type, %(reason)s
    FROM doomed
)
SELECT doomed.id FROM doomed
