-- Reads the objects of a schema, one row each: kind, name, and everything that must be the same in every database.
-- Run it with an empty search_path, so that every name has its schema.
WITH scope AS (
    SELECT oid FROM pg_namespace WHERE nspname = %(schema)s
),
relations AS (
    SELECT class.oid, class.relname, class.relkind, class.relacl, class.relowner, class.relrowsecurity, class.reloptions
    FROM pg_class AS class
    JOIN scope ON scope.oid = class.relnamespace
    WHERE class.relkind IN ('r', 'p', 'v', 'S')
),
functions AS (
    SELECT proc.*
    FROM pg_proc AS proc
    JOIN scope ON scope.oid = proc.pronamespace
),
-- Who has which right. The owner's own rights are left out.
rights AS (
    SELECT relation.relname::text AS name, relation.relowner AS owner, acl.grantee, acl.privilege_type
    FROM relations AS relation
    CROSS JOIN LATERAL aclexplode(relation.relacl) AS acl
    UNION ALL
    SELECT relation.relname || '.' || attribute.attname, relation.relowner, acl.grantee, acl.privilege_type
    FROM relations AS relation
    JOIN pg_attribute AS attribute ON attribute.attrelid = relation.oid AND NOT attribute.attisdropped
    CROSS JOIN LATERAL aclexplode(attribute.attacl) AS acl
    UNION ALL
    SELECT
        function.proname || '(' || pg_get_function_identity_arguments(function.oid) || ')',
        function.proowner, acl.grantee, acl.privilege_type
    FROM functions AS function
    CROSS JOIN LATERAL aclexplode(coalesce(function.proacl, acldefault('f', function.proowner))) AS acl
)
SELECT
    'table' AS kind, relation.relname::text AS name,
    'row security ' || relation.relrowsecurity || CASE
        WHEN EXISTS (
            SELECT
            FROM pg_trigger AS trigger
            WHERE trigger.tgrelid = relation.oid AND trigger.tgisinternal AND trigger.tgenabled <> 'O'
        )
        THEN ' (foreign keys)'
        ELSE ''
    END AS definition
FROM relations AS relation
WHERE relation.relkind IN ('r', 'p')
UNION ALL
SELECT
    'column', relation.relname || '.' || attribute.attname,
    concat_ws(' ', format_type(attribute.atttypid, attribute.atttypmod),
        CASE WHEN attribute.attnotnull THEN 'NOT NULL' END,
        CASE attribute.attidentity WHEN 'a' THEN 'identity always' WHEN 'd' THEN 'identity' END,
        CASE WHEN attribute.attgenerated <> '' THEN 'generated' END,
        'default ' || pg_get_expr(fallback.adbin, fallback.adrelid))
FROM relations AS relation
JOIN pg_attribute AS attribute
    ON attribute.attrelid = relation.oid AND attribute.attnum > 0 AND NOT attribute.attisdropped
LEFT JOIN pg_attrdef AS fallback ON fallback.adrelid = attribute.attrelid AND fallback.adnum = attribute.attnum
WHERE relation.relkind IN ('r', 'p')
UNION ALL
SELECT
    'constraint', relation.relname || '.' || constraint_.conname,
    pg_get_constraintdef(constraint_.oid)
FROM relations AS relation
JOIN pg_constraint AS constraint_
    ON constraint_.conrelid = relation.oid AND constraint_.contype IN ('c', 'f', 'p', 'u', 'x')
UNION ALL
SELECT
    'index', class.relname::text,
    pg_get_indexdef(index.indexrelid) || CASE WHEN index.indisvalid AND index.indisready THEN '' ELSE ' (invalid)' END
FROM relations AS relation
JOIN pg_index AS index ON index.indrelid = relation.oid
JOIN pg_class AS class ON class.oid = index.indexrelid
UNION ALL
SELECT
    'trigger', relation.relname || '.' || trigger.tgname,
    pg_get_triggerdef(trigger.oid) || CASE trigger.tgenabled WHEN 'O' THEN '' ELSE ' (switched off)' END
FROM relations AS relation
JOIN pg_trigger AS trigger ON trigger.tgrelid = relation.oid AND NOT trigger.tgisinternal
UNION ALL
SELECT
    'policy', policy.tablename || '.' || policy.policyname,
    concat_ws(' ', policy.permissive, policy.cmd, policy.roles::text, 'using ' || policy.qual,
        'check ' || policy.with_check)
FROM pg_policies AS policy
WHERE policy.schemaname = %(schema)s
UNION ALL
SELECT
    'view', relation.relname::text, md5(replace(pg_get_viewdef(relation.oid), %(schema)s, 'public'))
    || coalesce(' ' || array_to_string(relation.reloptions, ' '), '')
FROM relations AS relation
WHERE relation.relkind = 'v'
UNION ALL
SELECT
    'function', function.proname || '(' || pg_get_function_identity_arguments(function.oid) || ')',
    concat_ws(' ', 'returns', pg_get_function_result(function.oid), language.lanname, function.provolatile,
        CASE WHEN function.prosecdef THEN 'security definer' END, array_to_string(function.proconfig, ' '),
        -- The role that runs the body, and so the rights that the function has.
        CASE
            WHEN NOT function.prosecdef THEN NULL
            WHEN pg_get_userbyid(function.proowner) = 'training_daemon' THEN 'of training_daemon'
            ELSE 'of its maker'
        END,
        md5(replace(function.prosrc, %(schema)s, 'public')))
FROM functions AS function
JOIN pg_language AS language ON language.oid = function.prolang
UNION ALL
SELECT 'right', rights.name || ': ' || rights.privilege_type || ' of ' || coalesce(role.rolname, 'PUBLIC'), ''
FROM rights
LEFT JOIN pg_roles AS role ON role.oid = rights.grantee
WHERE rights.grantee <> rights.owner
  AND coalesce(role.rolname, 'PUBLIC') IN ('PUBLIC', 'anon', 'authenticated', 'service_role', 'training_daemon')
  -- A right of newer versions that older ones do not have.
  AND rights.privilege_type <> 'MAINTAIN'
UNION ALL
SELECT 'right', 'schema: USAGE of ' || role.rolname, ''
FROM scope
CROSS JOIN pg_roles AS role
WHERE role.rolname IN ('anon', 'authenticated', 'service_role', 'training_daemon')
  AND has_schema_privilege(role.oid, scope.oid, 'USAGE')
UNION ALL
-- If there is no publication, or one of all tables, nothing is missing in it.
SELECT 'publication', member, ''
FROM unnest(ARRAY['training_jobs', 'training_events', 'metrics_points']) AS member
WHERE %(schema)s <> 'public'
   OR NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'supabase_realtime' AND NOT puballtables)
   OR EXISTS (
       SELECT
       FROM pg_publication_tables AS published
       WHERE published.pubname = 'supabase_realtime'
         AND published.schemaname = 'public'
         AND published.tablename = member
   )
