-- What a path inside a bucket may be, once: the guard of datasets and the fronts ask this function. The daemon has the same
-- rule for whatever it opens or stores (daemon.storage.interface); tests/dataset/test_paths.py compares the two.

SET LOCAL lock_timeout = '1s';

-- What Storage allows in a name, and no segment that is empty or dots. Null for no path.
CREATE OR REPLACE FUNCTION public.training_is_object_path(path text) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = ''
AS $$
    SELECT path ~ '^[A-Za-z0-9!_.*''()&$@=;:+,?\- /]+$'
       AND length(path) <= 900
       AND path !~ '(^|/)\.{0,2}(/|$)'
$$;

REVOKE EXECUTE ON FUNCTION public.training_is_object_path(text) FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_is_object_path(text) TO authenticated, training_daemon;

-- The guard of 20261128000003 again; what is new is that it asks the function above.
CREATE OR REPLACE FUNCTION public.training_datasets_guard() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
    IF current_user <> 'authenticated' THEN
        RETURN NEW;
    END IF;
    IF TG_OP = 'UPDATE' AND (NEW.user_id, NEW.storage_bucket, NEW.storage_path)
        IS NOT DISTINCT FROM (OLD.user_id, OLD.storage_bucket, OLD.storage_path) THEN
        RETURN NEW;
    END IF;
    -- The row that the job guard makes for a dataset_url; no bucket has this name.
    IF NEW.storage_bucket = 'url' AND NEW.storage_path LIKE 'urls/%' THEN
        RETURN NEW;
    END IF;
    IF coalesce(NEW.storage_bucket, '') NOT IN ('lora-datasets', 'training-files') THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('datasets are not read from the bucket %s', coalesce(NEW.storage_bucket, '(none)')),
            HINT = 'store the file in lora-datasets';
    END IF;
    IF NOT public.training_is_object_path(NEW.storage_path) THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('%s is not a path inside a bucket', left(NEW.storage_path, 200)),
            HINT = format('store the file under %s/', NEW.user_id);
    END IF;
    IF starts_with(NEW.storage_path, NEW.user_id::text || '/') THEN
        RETURN NEW;
    END IF;
    IF NEW.storage_bucket <> 'training-files' THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'the storage path of a dataset begins with its owner''s id',
            HINT = format('store the file under %s/', NEW.user_id);
    END IF;
    IF NOT public.training_owns_file(NEW.user_id, NEW.storage_path) THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = 'the storage path names no training file of this user',
            HINT = format('begin it with the id of a row of training_files that you have made, or with %s/', NEW.user_id);
    END IF;
    RETURN NEW;
END
$$;
