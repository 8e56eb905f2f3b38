"""Reads two catalogues that can be compared: what the migrations create, and what a database has.

The expected catalogue is not written down anywhere. Instead the same server applies the migrations in a schema that no
other session sees, and rolls them back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psycopg

_ELSEWHERE = "trainer_reference"
_PUBLIC = re.compile(r"\bpublic\b")
_READ = (resources.files("sql.catalogue") / "read_catalogue.sql").read_bytes()
# Column types that an app may replace by others (daemon.schema.fit says by which).
_SERVED = re.compile(r"(?:text|character varying|numeric|integer|bigint)(?:\([\d,]+\))?")
_API_ROLES = "anon, authenticated, service_role"

Catalogue = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class Expected:
    """`ours` must be there unchanged. `app` describes the app's tables as we create them. `admitted` are all rights
    that may be there, including those that others granted, which we leave."""

    ours: Catalogue
    app: Catalogue
    admitted: frozenset[str]


def read_expected(db: psycopg.Connection[Any], files: Sequence[Sequence[str]], given: Sequence[str] = ()) -> Expected:
    """Reads what these migrations, each a list of statements, create on this server. The first makes the app's tables.

    `given` are more tables of the app that they need: taken as they are. Does not touch the real ones."""
    with _elsewhere(db) as schema:
        _apply(db, files[:1])
        app = read_catalogue(db, schema)
        _take_over_types(db, app)
        _copy_tables(db, given)
        before = read_catalogue(db, schema)
        _apply(db, files[1:])
        made = read_catalogue(db, schema)
    # Again as in an older project, where every role has rights on new objects: the rights that remain are allowed.
    with _elsewhere(db) as schema:
        _copy_tables(db, given)  # before that: the rights on the app's own tables are none of our business
        for what in ("TABLES", "SEQUENCES", "FUNCTIONS"):
            db.execute(f"ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT ALL ON {what} TO {_API_ROLES}".encode())
        _apply(db, files)
        generous = read_catalogue(db, schema)
    return Expected(
        ours={
            key: definition
            for key, definition in made.items()
            if before.get(key) != definition or key[0] == "publication"
        },
        app=app,
        admitted=frozenset(name for kind, name in generous if kind == "right"),
    )


def read_catalogue(db: psycopg.Connection[Any], schema: str = "public") -> dict[tuple[str, str], str]:
    """Reads what a schema holds now: kind and name, with everything that is compared."""
    with db.transaction():
        # Reading a view's definition waits for locks on its tables.
        db.execute("SET LOCAL lock_timeout = '1s'")
        db.execute("SET LOCAL search_path = ''")
        rows = db.execute(_READ, {"schema": schema}).fetchall()
    return {(kind, name.replace(schema, "public")): _as_public(text, schema) for kind, name, text in rows}


def _as_public(definition: str, schema: str) -> str:
    """Returns the definition as it is in the real schema, where users are Supabase's."""
    if schema != "public":
        definition = definition.replace(f"{schema}.users(", "auth.users(")
    return definition.replace(schema, "public")


def _take_over_types(db: psycopg.Connection[Any], app: Catalogue) -> None:
    """Uses the app's column types, because definitions depend on them: a view has a cast for varchar, none for text."""
    for relation, column, found in db.execute(
        "SELECT class.relname, attribute.attname, format_type(attribute.atttypid, attribute.atttypmod) "
        "FROM pg_class AS class JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid "
        "WHERE class.relnamespace = to_regnamespace('public') AND class.relkind = 'r' AND attribute.attnum > 0"
    ).fetchall():
        made = app.get(("column", f"{relation}.{column}"), "")
        if _SERVED.match(made) and _SERVED.fullmatch(found) and not made.startswith(f"{found} "):
            alter = f'ALTER TABLE {_ELSEWHERE}."{relation}" ALTER COLUMN "{column}"'
            db.execute(f"{alter} TYPE {found} USING NULL::{found}".encode())


def _copy_tables(db: psycopg.Connection[Any], tables: Sequence[str]) -> None:
    """Makes empty copies of tables of the app. One that is missing is left to the migration that needs it to report."""
    for table in tables:
        if db.execute("SELECT WHERE to_regclass('public.' || %s) IS NOT NULL", (table,)).fetchone() is not None:
            db.execute(f'CREATE TABLE {_ELSEWHERE}."{table}" (LIKE public."{table}")'.encode())


@contextmanager
def _elsewhere(db: psycopg.Connection[Any]) -> Iterator[str]:
    with db.transaction(force_rollback=True):
        db.execute("SET LOCAL client_min_messages = error")
        db.execute(f"CREATE SCHEMA {_ELSEWHERE}".encode())
        # A users table, too: a reference to the real one would block people who sign up.
        db.execute(f"CREATE TABLE {_ELSEWHERE}.users (id uuid PRIMARY KEY)".encode())
        yield _ELSEWHERE


def _apply(db: psycopg.Connection[Any], files: Sequence[Sequence[str]]) -> None:
    for statement in (statement for statements in files for statement in statements):
        moved = _PUBLIC.sub(_ELSEWHERE, statement).replace("auth.users", f"{_ELSEWHERE}.users")
        db.execute(moved.encode())
