-- Asks a host to drain; its daemon sees the flag at its next touch. No row means that there is no such worker.
UPDATE public.training_workers AS worker
SET drain = true
WHERE worker.id = %(id)s
RETURNING worker.id
