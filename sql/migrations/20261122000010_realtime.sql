-- The app subscribes to its jobs by Realtime: our tables join the publication where there is one.
-- After row level security and grants, never before: what is published is checked against them.

SET LOCAL lock_timeout = '1s';

DO $$
DECLARE
    relation text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'supabase_realtime' AND NOT puballtables) THEN
        RETURN;
    END IF;
    FOREACH relation IN ARRAY ARRAY['training_jobs', 'training_events', 'metrics_points'] LOOP
        IF NOT EXISTS (
            SELECT FROM pg_publication_tables
            WHERE pubname = 'supabase_realtime' AND schemaname = 'public' AND tablename = relation
        ) THEN
            BEGIN
                EXECUTE format('ALTER PUBLICATION supabase_realtime ADD TABLE public.%I', relation);
            EXCEPTION WHEN insufficient_privilege THEN
                RAISE WARNING 'cannot add % to supabase_realtime: its owner must', relation;
            END;
        END IF;
    END LOOP;
END
$$;
