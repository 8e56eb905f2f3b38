-- Reads the CHECKs of the app's tables that use only one column, with their expression, to try values with.
SELECT
    class.relname::text AS relation,
    constraint_.conname::text AS name,
    attribute.attname::text AS column,
    format_type(attribute.atttypid, attribute.atttypmod) AS type,
    pg_get_expr(constraint_.conbin, constraint_.conrelid) AS condition
FROM pg_constraint AS constraint_
JOIN pg_class AS class ON class.oid = constraint_.conrelid
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace AND namespace.nspname = 'public'
JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid AND attribute.attnum = constraint_.conkey[1]
WHERE constraint_.contype = 'c'
  AND cardinality(constraint_.conkey) = 1
  AND class.relname = ANY (%(relations)s)
ORDER BY class.relname, constraint_.conname
