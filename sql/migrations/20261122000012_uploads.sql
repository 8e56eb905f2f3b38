-- What attempts may have put into Storage and no finished row names yet: no file there is unaccounted for.

SET LOCAL lock_timeout = '1s';

-- Noted before the first byte is sent, forgotten when the objects are deleted or the job's row names them. No foreign
-- key: the note outlives the job's row, so that the files of a deleted job are still found. `manifest_sha256` stands
-- when a checkpoint is stored as a whole, its manifest last; only then may another host resume from it. `storage` says
-- which one: two projects, or the folders of two hosts, may each have a bucket of the same name.
CREATE TABLE IF NOT EXISTS public.training_uploads (
    job_id uuid NOT NULL,
    epoch bigint NOT NULL,
    kind text NOT NULL,
    step integer NOT NULL DEFAULT 0,
    storage text NOT NULL,
    bucket text NOT NULL,
    objects text[] NOT NULL,
    manifest_sha256 text,
    bytes bigint,
    noted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT training_uploads_pkey PRIMARY KEY (job_id, epoch, kind, step),
    CONSTRAINT training_uploads_kind_known CHECK (kind IN ('adapter', 'checkpoint'))
);

REVOKE ALL ON public.training_uploads FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT ON public.training_uploads TO service_role;
GRANT SELECT, INSERT, UPDATE, DELETE ON public.training_uploads TO training_daemon;

ALTER TABLE public.training_uploads ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS trainer_training_daemon_all ON public.training_uploads;
CREATE POLICY trainer_training_daemon_all ON public.training_uploads FOR ALL TO training_daemon
    USING (true) WITH CHECK (true);
