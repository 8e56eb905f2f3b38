-- Records since when a pod has no job, or that it has one again (since is null). No row means that it has ended.
UPDATE training_pods AS pod
SET idle_since = %(since)s
WHERE pod.id = %(id)s
  AND pod.ended_at IS NULL
RETURNING pod.id
