-- Records a decision that changes no pod's row: why nothing is started, or that a stray pod is ended. Always one row.
INSERT INTO training_fleet_decisions (at, decision, pod_row, pod, gpu_type, reason)
VALUES (%(now)s, %(decision)s, %(pod_row)s, %(pod)s, %(gpu_type)s, %(reason)s)
RETURNING id
