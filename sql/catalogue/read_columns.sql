-- Reads every column of the named tables of a schema, with everything that decides whether we can use it.
SELECT
    class.relname::text AS relation,
    class.relkind::text AS relkind,
    attribute.attname::text AS name,
    format_type(attribute.atttypid, attribute.atttypmod) AS type,
    attribute.attnotnull AS not_null,
    fallback.oid IS NOT NULL OR attribute.attidentity <> '' AS filled,
    attribute.attgenerated <> '' OR attribute.attidentity = 'a' AS generated,
    EXISTS (
        SELECT
        FROM pg_index AS index
        WHERE index.indrelid = class.oid
          AND index.indisunique AND index.indisvalid
          AND index.indpred IS NULL
          AND index.indnkeyatts = 1
          AND index.indkey[0] = attribute.attnum
    ) AS is_unique
FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace AND namespace.nspname = 'public'
JOIN pg_attribute AS attribute
    ON attribute.attrelid = class.oid AND attribute.attnum > 0 AND NOT attribute.attisdropped
LEFT JOIN pg_attrdef AS fallback ON fallback.adrelid = class.oid AND fallback.adnum = attribute.attnum
WHERE class.relname = ANY (%(relations)s)
  AND class.relkind IN ('r', 'p', 'v', 'm', 'f')
ORDER BY class.relname, attribute.attnum
