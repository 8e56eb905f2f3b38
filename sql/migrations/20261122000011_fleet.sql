-- The fleet loop's memory: the pods that it asked for, and each of its decisions with the reason.

SET LOCAL lock_timeout = '1s';

-- A row is there before its pod is: a loop that dies between asking RunPod and noting the answer finds the pod again
-- by its name, which carries this id. `doom` is why a pod is being ended, `ending` how it was.
CREATE TABLE IF NOT EXISTS public.training_pods (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    slot smallint NOT NULL,
    gpu_type text NOT NULL,
    gpu_count integer NOT NULL,
    pod text,
    price_per_hour double precision,
    asked_at timestamptz NOT NULL,
    reported_at timestamptz,
    idle_since timestamptz,
    doomed_at timestamptz,
    doom text,
    ended_at timestamptz,
    ending text,
    CONSTRAINT training_pods_slot_positive CHECK (slot >= 1),
    CONSTRAINT training_pods_end_has_a_reason CHECK ((ended_at IS NULL) = (ending IS NULL))
);

-- The limit of pods: counting is a race, a numbered slot is not.
CREATE UNIQUE INDEX IF NOT EXISTS training_pods_slot ON public.training_pods (slot) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS training_pods_asked ON public.training_pods (asked_at);

CREATE TABLE IF NOT EXISTS public.training_fleet_decisions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    decision text NOT NULL,
    pod_row uuid REFERENCES public.training_pods (id) ON DELETE CASCADE,
    pod text,
    gpu_type text,
    reason text NOT NULL
);

CREATE INDEX IF NOT EXISTS training_fleet_decisions_pod ON public.training_fleet_decisions (pod_row);

REVOKE ALL ON public.training_pods, public.training_fleet_decisions FROM PUBLIC, anon, authenticated, service_role;
REVOKE ALL ON SEQUENCE public.training_fleet_decisions_id_seq FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT ON public.training_pods, public.training_fleet_decisions TO service_role;
GRANT SELECT, INSERT, UPDATE ON public.training_pods TO training_daemon;
GRANT SELECT, INSERT ON public.training_fleet_decisions TO training_daemon;

ALTER TABLE public.training_pods ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_fleet_decisions ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS trainer_training_daemon_all ON public.training_pods;
CREATE POLICY trainer_training_daemon_all ON public.training_pods FOR ALL TO training_daemon
    USING (true) WITH CHECK (true);
DROP POLICY IF EXISTS trainer_training_daemon_all ON public.training_fleet_decisions;
CREATE POLICY trainer_training_daemon_all ON public.training_fleet_decisions FOR ALL TO training_daemon
    USING (true) WITH CHECK (true);
