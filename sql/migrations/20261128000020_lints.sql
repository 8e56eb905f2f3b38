-- What Supabase's linter said of our tables: foreign keys without an index, and a function without a search_path.
--
-- A delete of a user, a dataset or an artifact looks for the rows that refer to it: without an index it reads each of
-- these tables whole, and locks the row meanwhile. Each index is made only where no valid index begins with its column:
-- the app has some of them under names of its own. The columns are written with the row or at its end, never by
-- progress, so that a job's frequent writes stay HOT.
--
-- While an index is made, writers of its table wait: one to three seconds for a million rows, and these tables have a
-- few rows a job. Where that is too long, make it before under the same name, with CREATE INDEX CONCURRENTLY.

SET LOCAL lock_timeout = '1s';

DO $$
DECLARE
    needed record;
BEGIN
    FOR needed IN
        SELECT * FROM (VALUES
            ('datasets', 'user_id', 'datasets_of_user', false),
            ('cost_records', 'user_id', 'cost_records_of_user', false),
            ('model_artifacts', 'user_id', 'model_artifacts_of_user', false),
            ('model_artifacts', 'dataset_id', 'training_artifacts_of_dataset', false),
            -- Null in most rows.
            ('model_artifacts', 'parent_model_id', 'training_artifacts_of_parent', true),
            ('training_jobs', 'artifact_id', 'training_jobs_of_artifact', true)
        ) AS wanted (relation, field, name, sparse)
    LOOP
        -- The same rule as in daemon.schema.installation, which counts such an index as ours.
        IF NOT EXISTS (
            SELECT FROM pg_index AS index
            JOIN pg_class AS class ON class.oid = index.indexrelid
            JOIN pg_am AS method ON method.oid = class.relam AND method.amname = 'btree'
            JOIN pg_attribute AS attribute
                ON attribute.attrelid = index.indrelid AND attribute.attnum = index.indkey[0]
            WHERE index.indrelid = ('public.' || needed.relation)::regclass
              AND attribute.attname = needed.field
              AND index.indisvalid
              AND (
                  index.indpred IS NULL
                  OR pg_get_expr(index.indpred, index.indrelid) = format('(%I IS NOT NULL)', needed.field)
              )
        ) THEN
            EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON public.%I (%I)', needed.name, needed.relation, needed.field)
                || CASE WHEN needed.sparse THEN format(' WHERE %I IS NOT NULL', needed.field) ELSE '' END;
        END IF;
    END LOOP;

    -- Only the function that we made: the app's own stays as it is.
    IF EXISTS (
        SELECT FROM pg_proc
        WHERE oid = to_regprocedure('public.update_updated_at_column()')
          AND regexp_replace(prosrc, '\s+', ' ', 'g') = ' BEGIN NEW.updated_at = now(); RETURN NEW; END '
    ) THEN
        ALTER FUNCTION public.update_updated_at_column() SET search_path = '';
    END IF;
END
$$;
