-- How a user's dataset gets into Storage and his adapter out of it, with his own session and no key of the server's:
-- both buckets, private, and one policy for each verb.
--
-- Does nothing on a plain Postgres, which has no Storage. Where Storage is installed after this file was applied, run
-- it once more by hand: it may be run any number of times.

SET LOCAL lock_timeout = '1s';

DO $$
DECLARE
    -- The same beginning and the same alphabet as the guard of `datasets` asks for, so that what could be uploaded can
    -- also be trained on.
    own_dataset constant text :=
        'bucket_id = ''lora-datasets'' AND starts_with(name, (SELECT auth.uid())::text || ''/'')';
    -- The paths that the trainer wrote into the user's own artifacts; users may not change them. Not correlated with
    -- the object, so that it is read once for a whole listing.
    own_adapter constant text := $adapter$bucket_id = 'lora-models' AND name IN (
        SELECT jsonb_path_query(model.artifacts, '$.* ? (@.type() == "string")') #>> '{}'
        FROM public.model_artifacts AS model
        WHERE model.user_id = (SELECT auth.uid())
    )$adapter$;
    rule record;
BEGIN
    -- To compare, `migrate` and `doctor` apply every file once more in a schema that is called otherwise: this one would
    -- lock Storage for it.
    IF 'public' = 'trainer_reference' THEN
        RETURN;
    END IF;
    IF to_regclass('storage.buckets') IS NULL OR to_regclass('storage.objects') IS NULL THEN
        RETURN;
    END IF;
    BEGIN
        -- Private, as every bucket is that does not say otherwise.
        INSERT INTO storage.buckets (id, name)
        VALUES ('lora-datasets', 'lora-datasets'), ('lora-models', 'lora-models')
        ON CONFLICT DO NOTHING;
        FOR rule IN
            SELECT * FROM (VALUES
                ('SELECT', format('USING ((%s) OR (%s))', own_dataset, own_adapter)),
                ('INSERT', format('WITH CHECK (%s AND public.training_is_object_path(name))', own_dataset)),
                ('DELETE', format('USING (%s)', own_dataset))
            ) AS rules (verb, body)
        LOOP
            EXECUTE format('DROP POLICY IF EXISTS %I ON storage.objects', 'trainer_authenticated_' || lower(rule.verb));
            EXECUTE format('CREATE POLICY %I ON storage.objects FOR %s TO authenticated %s',
                'trainer_authenticated_' || lower(rule.verb), rule.verb, rule.body);
        END LOOP;
    EXCEPTION WHEN insufficient_privilege THEN
        RAISE WARNING 'this login may not make buckets or policies in Storage: %', SQLERRM
            USING HINT = 'run 20261128000028_storage_policies.sql again as the owner of storage.objects';
    END;
END
$$;
