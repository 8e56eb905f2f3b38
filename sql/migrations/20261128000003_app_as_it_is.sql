-- The app as it really is: its validation writes a column that no migration makes, and its own migrations may come
-- after ours.

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
