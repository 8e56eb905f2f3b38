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

-- The app tells its users some things itself (job_queued, job_cancelled), as the user: everybody to himself only.
GRANT INSERT ON public.notifications TO authenticated;
DROP POLICY IF EXISTS trainer_authenticated_insert ON public.notifications;
CREATE POLICY trainer_authenticated_insert ON public.notifications FOR INSERT TO authenticated
    WITH CHECK ((SELECT auth.uid()) = user_id);

-- Records that an older dispatcher still handles a job that the trainer runs: in the job's story, once a day at most.
CREATE OR REPLACE FUNCTION public.training_note_dispatcher(job_id uuid, said text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
    INSERT INTO public.training_events (job_id, epoch, kind, message, data)
    SELECT job.id, job.lease_epoch, 'notice',
        format('An older dispatcher still handles this job: it sent the notification %s, which is not true and was '
            || 'not delivered. Switch the dispatcher off; doctor says where it may run.', said),
        jsonb_build_object('code', 'older_dispatcher', 'said', said)
    FROM public.training_jobs AS job
    WHERE job.id = training_note_dispatcher.job_id
      AND NOT EXISTS (
          SELECT FROM public.training_events AS earlier
          WHERE earlier.job_id = job.id
            AND earlier.kind = 'notice'
            AND earlier.data ->> 'code' = 'older_dispatcher'
            AND earlier.at > clock_timestamp() - interval '1 day'
      );
END
$$;

-- One notification for each thing that happened, whoever tells it and in whichever order.
--
-- The app's word stands and ours gives way: the app's cancel route first cancels, which makes our notification, and then
-- sends its own. Refusing or dropping its row would surprise it; so ours is taken back when its row comes, and not
-- written when its row was first.
--
-- An older dispatcher (an edge function on a schedule, as the service role) sends job_started or job_failed once a
-- minute for as long as a job waits, whatever becomes of its own updates. Of a job that the trainer runs these are not
-- true, and the trainer tells them itself: they are dropped, and the job's story says so. Dropped and not refused,
-- because a refusal would undo the record of it; the dispatcher looks at neither.
CREATE OR REPLACE FUNCTION public.training_notifications_guard() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
    subject text := coalesce(
        NEW.metadata ->> 'job_id',
        substring(NEW.action_url FROM '^/training/jobs/([^/?#]+)')
    );
BEGIN
    IF subject IS NULL OR subject !~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN
        RETURN NEW;
    END IF;
    IF current_user = 'training_daemon' THEN
        NEW.metadata := NEW.metadata || jsonb_build_object('source', 'trainer');
        IF NEW.type = 'job_cancelled' AND EXISTS (
            SELECT FROM public.notifications AS told
            JOIN public.training_jobs AS job ON job.id = subject::uuid
            WHERE told.user_id = NEW.user_id
              AND told.type = NEW.type
              AND told.metadata ->> 'job_id' = subject
              -- Of this run: a job that was submitted again may be cancelled again.
              AND told.created_at >= job.queued_at
        ) THEN
            RETURN NULL;
        END IF;
        RETURN NEW;
    END IF;
    IF NEW.type IN ('job_started', 'job_completed', 'job_failed', 'artifact_ready') THEN
        IF current_user = 'service_role' AND EXISTS (
            SELECT FROM public.training_jobs AS job
            WHERE job.id = subject::uuid
              AND (job.status = 'queued' OR job.lease_epoch > 0)
        ) THEN
            PERFORM public.training_note_dispatcher(subject::uuid, NEW.type);
            RETURN NULL;
        END IF;
        RETURN NEW;
    END IF;
    DELETE FROM public.notifications AS ours
    WHERE ours.user_id = NEW.user_id
      AND ours.type = NEW.type
      AND ours.metadata ->> 'job_id' = subject
      AND ours.metadata ->> 'source' = 'trainer';
    RETURN NEW;
EXCEPTION WHEN insufficient_privilege THEN
    RETURN NEW;  -- a role of the app's own that may insert and nothing else
END
$$;

CREATE OR REPLACE TRIGGER training_notifications_guard
    BEFORE INSERT ON public.notifications
    FOR EACH ROW EXECUTE FUNCTION public.training_notifications_guard();

-- What might still dispatch jobs in the older way, as far as the database knows: jobs of pg_cron and webhooks on
-- training_jobs, with the edge functions that they call. `cron`: none, all (every job was looked at), own (only its own
-- were shown to this function's maker) or unreadable. Never the commands themselves: they hold keys.
CREATE OR REPLACE FUNCTION public.training_find_dispatchers() RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
    calls constant text := '/functions/v1/([A-Za-z0-9_.-]+)';
    -- By what they are called, and what they call; our own functions may be put on a schedule and are none.
    dispatching constant text := 'train|lora|pipeline|artifact|dispatch|gpu|runpod|job[-_]?(process|run|work|queue)|'
        || 'process[-_a-z]*job';
    our_own constant text := 'reap_expired_leases|prune_training_history|release_held_jobs';
    seen text := 'none';
    scheduled jsonb := '[]';
    hooked jsonb;
BEGIN
    BEGIN
        IF EXISTS (
            SELECT FROM pg_catalog.pg_class AS class
            JOIN pg_catalog.pg_namespace AS namespace ON namespace.oid = class.relnamespace
            WHERE namespace.nspname = 'cron' AND class.relname = 'job'
        ) THEN
            -- A command may call the edge function itself, or a function of the database that does.
            EXECUTE $read$
                SELECT
                    CASE WHEN row_security_active('cron.job') THEN 'own' ELSE 'all' END,
                    coalesce(
                        (
                            SELECT jsonb_agg(jsonb_build_object(
                                'name', coalesce(entry.jobname, 'job ' || entry.jobid),
                                'schedule', entry.schedule,
                                'calls', (
                                    SELECT coalesce(jsonb_agg(DISTINCT called.name[1]), '[]')
                                    FROM regexp_matches(entry.command || ' ' || body.text, $1, 'g') AS called (name)
                                ),
                                'suspect',
                                    concat_ws(' ', entry.jobname,
                                        regexp_replace(entry.command || ' ' || body.text, $3, '', 'gi')) ~* $2
                            ) ORDER BY entry.jobid)
                            FROM cron.job AS entry
                            CROSS JOIN LATERAL (
                                SELECT coalesce(string_agg(function.prosrc, ' '), '') AS text
                                FROM pg_catalog.pg_proc AS function
                                WHERE function.prosrc ~ $1 AND position(function.proname IN entry.command) > 0
                            ) AS body
                            WHERE entry.active
                        ),
                        '[]'
                    )
            $read$
            INTO seen, scheduled
            USING calls, dispatching, our_own;
        END IF;
    EXCEPTION WHEN insufficient_privilege OR undefined_table OR undefined_column THEN
        seen := 'unreadable';
    END;
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'name', hook.tgname,
        'schedule', 'an insert into training_jobs',
        'calls', (
            SELECT coalesce(jsonb_agg(DISTINCT called.name[1]), '[]')
            FROM regexp_matches(body.text, calls, 'g') AS called (name)
        ),
        'suspect', hook.tgname || ' ' || body.text ~* dispatching
    ) ORDER BY hook.tgname), '[]')
    INTO hooked
    FROM pg_catalog.pg_trigger AS hook
    JOIN pg_catalog.pg_proc AS function ON function.oid = hook.tgfoid
    CROSS JOIN LATERAL (
        SELECT pg_catalog.encode(hook.tgargs, 'escape') || ' ' || function.prosrc AS text
    ) AS body
    WHERE hook.tgrelid = 'public.training_jobs'::regclass
      AND NOT hook.tgisinternal
      AND hook.tgenabled <> 'D'
      -- On inserts: what comes of a change of status (a mail, say) dispatches nothing.
      AND hook.tgtype::integer & 4 <> 0
      AND body.text ~ calls;
    RETURN jsonb_build_object('cron', seen, 'scheduled', scheduled, 'webhooks', hooked);
END
$$;

GRANT CREATE ON SCHEMA public TO training_daemon;
ALTER FUNCTION public.training_note_dispatcher(uuid, text) OWNER TO training_daemon;
REVOKE CREATE ON SCHEMA public FROM training_daemon;

REVOKE EXECUTE ON FUNCTION
    public.training_owns_file(uuid, text), public.training_datasets_guard(),
    public.training_note_dispatcher(uuid, text), public.training_notifications_guard(),
    public.training_find_dispatchers()
FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION public.training_owns_file(uuid, text) TO authenticated, training_daemon;
GRANT EXECUTE ON FUNCTION public.training_note_dispatcher(uuid, text) TO service_role;
GRANT EXECUTE ON FUNCTION public.training_find_dispatchers() TO training_daemon;
