"""A pool of databases that tests reuse: emptied after each test, and replaced if a test changed more than rows.

Making one takes ten times as long as emptying one. Any change in the database's whole catalogue counts, so that each
test finds the database as fresh as one copied for it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

from tests.postgres import Server

# Everything that DDL, grants, settings and ANALYZE leave in a database. Without xmin of pg_class: TRUNCATE changes it.
_CATALOGUE = """
WITH own AS (
    SELECT oid FROM pg_namespace
    WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND nspname NOT LIKE 'pg\\_temp%'
),
facts AS (
    SELECT 'database' AS kind, concat(datacl, datconnlimit, datallowconn, datdba) AS fact
    FROM pg_database WHERE datname = current_database()
    UNION ALL SELECT 'setting', concat(setrole, setconfig) FROM pg_db_role_setting
    WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL SELECT 'namespace', concat(oid, nspname, nspacl, nspowner) FROM pg_namespace
    WHERE nspname NOT LIKE 'pg\\_t%'
    UNION ALL SELECT 'class', concat(oid, relname, relkind, relowner, relacl, reloptions, relrowsecurity,
        relforcerowsecurity, relpersistence, relreplident, reltablespace)
    FROM pg_class WHERE relnamespace IN (SELECT oid FROM own)
    UNION ALL SELECT 'column', concat(attrelid, attnum, attribute.xmin) FROM pg_attribute AS attribute
    JOIN pg_class AS class ON class.oid = attrelid WHERE relnamespace IN (SELECT oid FROM own)
    UNION ALL SELECT 'sequence', concat(seqrelid, xmin) FROM pg_sequence
    UNION ALL SELECT 'default', concat(oid, xmin) FROM pg_attrdef
    UNION ALL SELECT 'function', concat(oid, xmin) FROM pg_proc WHERE pronamespace IN (SELECT oid FROM own)
    UNION ALL SELECT 'type', concat(oid, xmin) FROM pg_type WHERE typnamespace IN (SELECT oid FROM own)
    UNION ALL SELECT 'trigger', concat(oid, xmin) FROM pg_trigger
    UNION ALL SELECT 'rule', concat(rule.oid, rule.xmin) FROM pg_rewrite AS rule
    UNION ALL SELECT 'policy', concat(oid, xmin) FROM pg_policy
    UNION ALL SELECT 'constraint', concat(oid, xmin) FROM pg_constraint
    UNION ALL SELECT 'publication', concat(oid, xmin) FROM pg_publication
    UNION ALL SELECT 'published', concat(oid, xmin) FROM pg_publication_rel
    UNION ALL SELECT 'event trigger', concat(oid, xmin) FROM pg_event_trigger
    UNION ALL SELECT 'extension', concat(oid, xmin) FROM pg_extension
    UNION ALL SELECT 'default acl', concat(oid, xmin) FROM pg_default_acl
    -- The five thousand of Postgres itself would take two thirds of the time.
    UNION ALL SELECT 'comment', concat(objoid, objsubid, xmin) FROM pg_description
    WHERE objoid >= 16384 OR classoid = 'pg_namespace'::regclass
    UNION ALL SELECT 'statistics', concat(starelid, staattnum) FROM pg_statistic
    JOIN pg_class AS class ON class.oid = starelid WHERE relnamespace IN (SELECT oid FROM own)
    UNION ALL SELECT 'large object', concat(oid, xmin) FROM pg_largeobject_metadata
    UNION ALL SELECT 'prepared', gid FROM pg_prepared_xacts
)
SELECT md5(string_agg(concat(kind, ' ', fact), E'\\n' ORDER BY kind, fact)) FROM facts
"""
_TABLES = """
SELECT class.oid::regclass::text FROM pg_class AS class JOIN pg_namespace AS space ON space.oid = relnamespace
WHERE relkind IN ('r', 'p') AND nspname NOT IN ('pg_catalog', 'information_schema') AND nspname NOT LIKE 'pg\\_t%'
ORDER BY 1
"""
# Used tables: they have or had rows, or VACUUM or ANALYZE has stored numbers about them.
_USED = """
SELECT oid::regclass::text FROM pg_class WHERE oid = ANY(%s::regclass[]) AND relkind = 'r'
AND (pg_relation_size(oid) > 0 OR relpages > 0 OR reltuples <> -1) ORDER BY 1
"""
_SEQUENCES = """
SELECT setval(seqrelid::regclass, seqstart, false) FROM pg_sequence
JOIN pg_sequences ON format('%I.%I', schemaname, sequencename)::regclass = seqrelid WHERE last_value IS NOT NULL
"""
# The planner's numbers for a table that was never vacuumed.
_UNSEEN = """
SET allow_system_table_mods = on;
UPDATE pg_class SET relpages = 0, reltuples = -1, relallvisible = 0 WHERE oid = ANY({}::regclass[])
"""
_OTHERS = """
SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@dataclass(frozen=True)
class _Fresh:
    """A database of the pool, and its state when it was made."""

    name: str
    catalogue: str
    contents: Mapping[str, str | None]  # of the tables that have rows from the start


class DatabasePool:
    """Lends databases that look newly copied from a template. Use as a context manager."""

    def __init__(self, server: Server, template: str) -> None:
        self._server = server
        self._template = template
        self._free: list[_Fresh] = []
        self._stack = ExitStack()

    def __enter__(self) -> DatabasePool:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    @contextmanager
    def database(self) -> Iterator[str]:
        """Lends a database, by name, until the block ends; connections still open then are closed."""
        fresh = self._free.pop() if self._free else self._make()
        yield fresh.name
        if self._emptied(fresh):
            self._free.append(fresh)

    def _make(self) -> _Fresh:
        name = self._stack.enter_context(self._server.database(template=self._template))
        with psycopg.connect(self._server.dsn(name), autocommit=True) as admin:
            filled = [table for table in _tables(admin) if _content(admin, table) is not None]
            return _Fresh(name, _catalogue(admin), {table: _content(admin, table) for table in filled})

    def _emptied(self, fresh: _Fresh) -> bool:
        """Empties a database; False if it cannot be restored to its first state and must not be used again."""
        try:
            with psycopg.connect(self._server.dsn(fresh.name), autocommit=True) as admin:
                admin.execute(_OTHERS)
                if _catalogue(admin) != fresh.catalogue:
                    return False
                if any(_content(admin, table) != content for table, content in fresh.contents.items()):
                    return False
                _empty(admin, [table for table in _tables(admin) if table not in fresh.contents])
                return True
        except psycopg.Error:
            return False


def _empty(admin: psycopg.Connection, tables: list[str]) -> None:
    """Empties tables in 4 ms. TRUNCATE makes new files for all tables and indexes, used or not: 30 to 80 ms."""
    if used := _used(admin, tables):
        # The replica role fires no triggers, not even those of foreign keys.
        deletes = "; ".join(f"DELETE FROM {table}" for table in used)
        admin.execute(f"BEGIN; SET LOCAL session_replication_role = replica; {deletes}; COMMIT".encode())
        admin.execute(f"VACUUM {', '.join(used)}".encode())
        admin.execute(sql.SQL(_UNSEEN).format(sql.Literal(used)))
    admin.execute(_SEQUENCES.encode())
    if _used(admin, used):  # a lock of autovacuum kept VACUUM from freeing the pages
        admin.execute(f"TRUNCATE {', '.join(tables)}".encode())


def _used(admin: psycopg.Connection, tables: list[str]) -> list[str]:
    return [str(table) for (table,) in admin.execute(_USED.encode(), (tables,))]


def _catalogue(admin: psycopg.Connection) -> str:
    row = admin.execute(_CATALOGUE.encode()).fetchone()
    assert row is not None
    return str(row[0])


def _tables(admin: psycopg.Connection) -> list[str]:
    return [str(table) for (table,) in admin.execute(_TABLES.encode())]


def _content(admin: psycopg.Connection, table: str) -> str | None:
    """Returns a digest of the table's rows; None if it has none."""
    query = f"SELECT md5(string_agg(one::text, E'\\n' ORDER BY one::text)) FROM {table} AS one"
    row = admin.execute(query.encode()).fetchone()
    assert row is not None
    return None if row[0] is None else str(row[0])
