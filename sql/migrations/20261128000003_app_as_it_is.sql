-- The app as it really is: it imports training files, tells its users things itself, may still run an older dispatcher,
-- and may apply its own migrations after ours.

SET LOCAL lock_timeout = '1s';

-- The app's validation writes this column, and no migration of the app's makes it.
ALTER TABLE public.datasets ADD COLUMN IF NOT EXISTS error_message text;

-- Where we made the app's tables, earlier versions gave indexes and a trigger the names that the app's migration uses.
-- It would fail whole at the first of them, so they get names of our own. Only where all of this says that the tables
-- are ours: the reference to model_artifacts has our name, a dataset's name may be null, and no policy but ours is there.
DO $$
DECLARE
    old record;
BEGIN
    IF NOT EXISTS (
            SELECT FROM pg_constraint
            WHERE conrelid = 'public.training_jobs'::regclass AND conname = 'training_jobs_artifact_id_fkey'
        )
        OR EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = 'public.datasets'::regclass AND attname = 'name' AND attnotnull
        )
        OR EXISTS (
            SELECT FROM pg_policy
            WHERE polrelid = 'public.training_jobs'::regclass AND NOT starts_with(polname, 'trainer_')
        )
    THEN
        RETURN;
    END IF;
    FOR old IN
        SELECT given.name AS is_now, given.own_name
        FROM (VALUES
            ('training_jobs', 'idx_training_jobs_user_id', 'training_jobs_of_user'),
            ('training_jobs', 'idx_training_jobs_status', 'training_jobs_of_status'),
            ('training_jobs', 'idx_training_jobs_dataset_id', 'training_jobs_of_dataset'),
            ('metrics_points', 'idx_metrics_points_job_id', 'metrics_points_of_job'),
            ('cost_records', 'idx_cost_records_job_id', 'cost_records_of_job'),
            ('notifications', 'idx_notifications_user_id', 'notifications_of_user')
        ) AS given (relation, name, own_name)
        JOIN pg_index AS index
            ON index.indexrelid = to_regclass('public.' || given.name)
            AND index.indrelid = to_regclass('public.' || given.relation)
        WHERE to_regclass('public.' || given.own_name) IS NULL
    LOOP
        EXECUTE format('ALTER INDEX public.%I RENAME TO %I', old.is_now, old.own_name);
    END LOOP;
    IF EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = 'public.training_jobs'::regclass AND tgname = 'update_training_jobs_updated_at'
    ) THEN
        ALTER TRIGGER update_training_jobs_updated_at ON public.training_jobs RENAME TO training_jobs_updated_at;
    END IF;
END
$$;

-- Whether a path in the bucket training-files belongs to this user: it begins with the id of a row of training_files
-- that he has made. Asked by the guard of datasets and, before it signs a URL, by the daemon. Runs as its maker, who
-- sees the app's table; a user learns nothing about anybody else's files. False where the app has no such table.
CREATE OR REPLACE FUNCTION public.training_owns_file(owner uuid, path text) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    file_id text := split_part(path, '/', 1);
    caller text := coalesce(nullif(current_setting('role', true), 'none'), session_user);
    caller_id text := coalesce(
        nullif(current_setting('request.jwt.claim.sub', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
    );
    owns boolean;
BEGIN
    IF owner IS NULL
        OR (path ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/.') IS NOT TRUE
        OR to_regclass('public.training_files') IS NULL
        OR (caller = 'authenticated' AND caller_id IS DISTINCT FROM owner::text)
    THEN
        RETURN false;
    END IF;
    -- Who makes a row of training_files chooses its id: with another user's id he would claim that user's own folder.
    IF EXISTS (SELECT FROM auth."users" AS somebody WHERE somebody.id = file_id::uuid) THEN
        RETURN false;
    END IF;
    -- As text: created_by is a uuid in one edition of the app, and text in another. The table may come later than we.
    EXECUTE 'SELECT EXISTS (SELECT FROM public.training_files AS file WHERE file.id::text = $1 AND file.created_by::text = $2)'
    INTO owns
    USING file_id, owner::text;
    RETURN owns;
EXCEPTION WHEN undefined_column OR undefined_table OR insufficient_privilege THEN
    RETURN false;  -- a table of another kind with this name
END
$$;

-- Where a user's dataset may lie: in the app's own buckets, under his own id, or in a training file that he has made.
-- The service role may point anywhere; the daemon checks again, by the same rule, before it signs a URL
-- (daemon.dataset.fetch; one table of cases tests both).
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
    -- What Storage allows in a name, and no segment that is empty or dots.
    IF NEW.storage_path !~ '^[A-Za-z0-9!_.*''()&$@=;:+,?\- /]+$'
        OR length(NEW.storage_path) > 900
        OR NEW.storage_path ~ '(^|/)\.{0,2}(/|$)'
    THEN
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

REVOKE EXECUTE ON FUNCTION public.training_owns_file(uuid, text), public.training_datasets_guard()
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_owns_file(uuid, text) TO authenticated, training_daemon;
