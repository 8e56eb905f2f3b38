"""The rules of Supabase's database linter (the dashboard's advisors), written anew from its documentation.

Each is a query over the schema `public` that returns what it finds, one `subject` a row. Left out are the rules about a
running project: unused indexes, bloat, outdated extensions, sign-in settings, buckets, queues and replication slots.
"""

from __future__ import annotations

from tests.postgres import AppDatabase

# Roles that the API acts as, and PUBLIC.
_CALLERS = "ARRAY(SELECT oid FROM pg_roles WHERE rolname IN ('anon', 'authenticated')) || 0::oid"
_RELATIONS = """
    SELECT class.oid, class.relname::text AS name, class.relkind AS kind, class.relrowsecurity AS guarded
    FROM pg_class AS class
    WHERE class.relnamespace = 'public'::regnamespace
      AND NOT EXISTS (
          SELECT FROM pg_depend WHERE objid = class.oid AND classid = 'pg_class'::regclass AND deptype = 'e'
      )
"""
_POLICIES = """
    SELECT policy.polrelid AS relation, policy.polrelid::regclass::text AS name, policy.polname::text AS policy,
        policy.polpermissive AS permissive, policy.polcmd::text AS verb, policy.polroles AS roles,
        coalesce(pg_get_expr(policy.polqual, policy.polrelid), '') AS visible,
        coalesce(pg_get_expr(policy.polwithcheck, policy.polrelid), '') AS admitted
    FROM pg_policy AS policy
    JOIN pg_class AS class ON class.oid = policy.polrelid
    WHERE class.relnamespace = 'public'::regnamespace
"""
_FUNCTIONS = """
    SELECT proc.oid, proc.proname || '(' || pg_get_function_identity_arguments(proc.oid) || ')' AS name,
        proc.prosecdef AS definer, proc.proconfig AS settings, proc.prorettype = 'trigger'::regtype AS for_triggers
    FROM pg_proc AS proc
    WHERE proc.pronamespace = 'public'::regnamespace
      AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = proc.oid AND classid = 'pg_proc'::regclass AND deptype = 'e')
"""

RULES = {
    # A delete of the referenced row reads the whole referencing table. A partial index helps only if it leaves out
    # nothing but NULL.
    "unindexed_foreign_keys": f"""
        SELECT relation.name || '.' || (
            SELECT string_agg(attname, ', ' ORDER BY attnum) FROM pg_attribute
            WHERE attrelid = relation.oid AND attnum = ANY(key.conkey)
        ) AS subject
        FROM pg_constraint AS key
        JOIN ({_RELATIONS}) AS relation ON relation.oid = key.conrelid
        WHERE key.contype = 'f' AND NOT EXISTS (
            SELECT FROM pg_index AS index
            WHERE index.indrelid = key.conrelid AND index.indisvalid
              AND (string_to_array(index.indkey::text, ' ')::smallint[])[1:cardinality(key.conkey)] @> key.conkey
              AND (index.indpred IS NULL OR pg_get_expr(index.indpred, index.indrelid) = (
                  SELECT format('(%I IS NOT NULL)', attname) FROM pg_attribute
                  WHERE attrelid = key.conrelid AND ARRAY[attnum] = key.conkey
              ))
        )
    """,
    "auth_users_exposed": f"""
        SELECT relation.name AS subject
        FROM ({_RELATIONS}) AS relation
        JOIN pg_rewrite AS rule ON rule.ev_class = relation.oid
        JOIN pg_depend AS dependency ON dependency.objid = rule.oid AND dependency.classid = 'pg_rewrite'::regclass
        WHERE dependency.refobjid = 'auth.users'::regclass AND relation.kind IN ('v', 'm')
    """,
    # auth.uid() and its like, asked for every row and not once: anywhere but right after a SELECT.
    "auth_rls_initplan": f"""
        SELECT policy.name || ': ' || policy.policy AS subject
        FROM ({_POLICIES}) AS policy
        WHERE regexp_replace(
            policy.visible || ' ' || policy.admitted, '\\( *SELECT +(auth\\.\\w+|current_setting)\\(', '', 'gi'
        ) ~* '\\m(auth\\.(uid|role|email|jwt)|current_setting)\\('
    """,
    "no_primary_key": f"""
        SELECT relation.name AS subject FROM ({_RELATIONS}) AS relation
        WHERE relation.kind IN ('r', 'p')
          AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = relation.oid AND indisprimary)
    """,
    # Every role but those that row security does not bind, and Postgres' own.
    "multiple_permissive_policies": f"""
        SELECT policy.name || ' ' || verb.verb || ' ' || role.rolname AS subject
        FROM ({_POLICIES}) AS policy
        JOIN (VALUES ('SELECT', 'r'), ('INSERT', 'a'), ('UPDATE', 'w'), ('DELETE', 'd')) AS verb (verb, letter)
            ON policy.verb IN ('*', verb.letter)
        JOIN pg_roles AS role ON policy.roles && ARRAY[0::oid, role.oid]
        WHERE policy.permissive AND NOT role.rolsuper AND NOT role.rolbypassrls AND role.rolname !~ '^pg_'
          AND role.rolname IN ('anon', 'authenticated', 'authenticator', 'training_daemon')
        GROUP BY policy.name, verb.verb, role.rolname
        HAVING count(*) > 1
    """,
    "policy_exists_rls_disabled": f"""
        SELECT DISTINCT policy.name AS subject FROM ({_POLICIES}) AS policy
        JOIN pg_class AS class ON class.oid = policy.relation AND NOT class.relrowsecurity
    """,
    "rls_enabled_no_policy": f"""
        SELECT relation.name AS subject FROM ({_RELATIONS}) AS relation
        WHERE relation.guarded AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = relation.oid)
    """,
    "duplicate_index": f"""
        SELECT relation.name || ': ' || string_agg(index.indexrelid::regclass::text, ', ' ORDER BY 1) AS subject
        FROM ({_RELATIONS}) AS relation
        JOIN pg_index AS index ON index.indrelid = relation.oid
        GROUP BY relation.name, regexp_replace(pg_get_indexdef(index.indexrelid), ' INDEX .+ ON ', ' INDEX ON ')
        HAVING count(*) > 1
    """,
    "security_definer_view": f"""
        SELECT relation.name AS subject FROM ({_RELATIONS}) AS relation JOIN pg_class AS class USING (oid)
        WHERE relation.kind = 'v'
          AND NOT coalesce(class.reloptions, '{{}}') && '{{security_invoker=true,security_invoker=on}}'
    """,
    "function_search_path_mutable": f"""
        SELECT function.name AS subject FROM ({_FUNCTIONS}) AS function
        WHERE NOT EXISTS (SELECT FROM unnest(function.settings) AS setting WHERE setting LIKE 'search_path=%')
    """,
    "rls_disabled_in_public": f"""
        SELECT relation.name AS subject FROM ({_RELATIONS}) AS relation
        WHERE relation.kind IN ('r', 'p') AND NOT relation.guarded
    """,
    "extension_in_public": """
        SELECT extname::text AS subject FROM pg_extension WHERE extnamespace = 'public'::regnamespace
    """,
    "rls_references_user_metadata": f"""
        SELECT policy.name || ': ' || policy.policy AS subject FROM ({_POLICIES}) AS policy
        WHERE policy.visible || policy.admitted ~ 'user_meta_?data'
    """,
    "materialized_view_or_foreign_table_in_api": f"""
        SELECT relation.name AS subject FROM ({_RELATIONS}) AS relation WHERE relation.kind IN ('m', 'f')
    """,
    "unsupported_reg_types": f"""
        SELECT relation.name || '.' || attribute.attname AS subject
        FROM ({_RELATIONS}) AS relation
        JOIN pg_attribute AS attribute ON attribute.attrelid = relation.oid AND attribute.attnum > 0
        WHERE relation.kind IN ('r', 'p') AND format_type(attribute.atttypid, NULL) IN (
            'regcollation', 'regconfig', 'regdictionary', 'regnamespace', 'regoper', 'regoperator', 'regproc',
            'regprocedure'
        )
    """,
    # A reference to anything but the primary key of a table that Supabase owns may break when Supabase changes it.
    "fkey_to_auth_unique": f"""
        SELECT relation.name || ': ' || key.conname AS subject
        FROM pg_constraint AS key
        JOIN ({_RELATIONS}) AS relation ON relation.oid = key.conrelid
        JOIN pg_class AS referenced ON referenced.oid = key.confrelid
        JOIN pg_index AS index ON index.indexrelid = key.conindid
        WHERE key.contype = 'f' AND referenced.relnamespace = 'auth'::regnamespace AND NOT index.indisprimary
    """,
    # Writes that any caller may make to any row.
    "rls_policy_always_true": f"""
        SELECT policy.name || ': ' || policy.policy AS subject FROM ({_POLICIES}) AS policy
        WHERE policy.permissive AND policy.roles && ({_CALLERS}) AND policy.verb <> 'r' AND (
            (policy.verb IN ('w', 'd', '*') AND policy.visible IN ('true', '(1 = 1)', ''))
            OR (policy.verb IN ('a', 'w', '*') AND policy.admitted IN ('true', '(1 = 1)'))
            OR (policy.verb = 'a' AND policy.admitted = '')
        )
    """,
    "rls_policy_null_auth_disjunct": f"""
        SELECT policy.name || ': ' || policy.policy AS subject FROM ({_POLICIES}) AS policy
        WHERE policy.visible ~ ' OR ' AND policy.visible ~* '(auth\\.\\w+\\(|current_setting\\()[^()]*\\)+ IS NULL'
    """,
    "anon_table_exposed": f"""
        SELECT relation.name AS subject FROM ({_RELATIONS}) AS relation
        WHERE relation.kind IN ('r', 'p', 'v', 'm', 'f') AND has_any_column_privilege('anon', relation.oid, 'SELECT')
    """,
    "anon_security_definer_function_executable": f"""
        SELECT function.name AS subject FROM ({_FUNCTIONS}) AS function
        WHERE function.definer AND has_function_privilege('anon', function.oid, 'EXECUTE')
    """,
    "authenticated_security_definer_function_executable": f"""
        SELECT function.name AS subject FROM ({_FUNCTIONS}) AS function
        WHERE function.definer AND has_function_privilege('authenticated', function.oid, 'EXECUTE')
    """,
    "invalid_index": f"""
        SELECT index.indexrelid::regclass::text AS subject FROM ({_RELATIONS}) AS relation
        JOIN pg_index AS index ON index.indrelid = relation.oid AND NOT (index.indisvalid AND index.indisready)
    """,
    "autovacuum_disabled": f"""
        SELECT relation.name AS subject FROM ({_RELATIONS}) AS relation JOIN pg_class AS class USING (oid)
        WHERE class.reloptions && '{{autovacuum_enabled=false,autovacuum_enabled=off}}'
    """,
}


def findings(database: AppDatabase) -> set[str]:
    """Everything that the linter says: `rule: subject`."""
    return {f"{rule}: {row['subject']}" for rule, query in RULES.items() for row in database.run(query)}
