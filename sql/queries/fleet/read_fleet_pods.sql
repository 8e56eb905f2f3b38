-- Reads the pods that the fleet asked for and that have not ended, and those with the given ids, ended or not.
-- No row means that there are none.
SELECT pod.id, pod.gpu_type, pod.gpu_count, pod.pod, pod.asked_at, pod.reported_at, pod.idle_since,
       pod.doomed_at, pod.doom, pod.ended_at
FROM training_pods AS pod
WHERE pod.ended_at IS NULL
   OR pod.id = ANY (%(listed)s)
ORDER BY pod.asked_at, pod.id
