"""What the migrations make, and what a database has: two catalogues that can be compared.

What is expected is not written down anywhere. The migrations themselves are applied, in a schema that no other session
sees and that is rolled back, by the very server that is asked.
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
# The types that another app may have in place of ours (daemon.schema.fit says which for which).
_SERVED = re.compile(r"(?:text|character varying|numeric|integer|bigint)(?:\([\d,]+\))?")
_API_ROLES = "anon, authenticated, service_role"

Catalogue = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class Expected:
    """`ours` must be there as it is. `app` is what the app's tables are like where we make them. `admitted`: all rights
    that may be there, those among them that somebody else gave and that we leave as they are."""

    ours: Catalogue
    app: Catalogue
    admitted: frozenset[str]


def read_expected(db: psycopg.Connection[Any], files: Sequence[Sequence[str]]) -> Expected:
    """What these migrations make on this server, each a list of statements. The first makes what is the app's own.

    Touches no table of the app's."""
    with _elsewhere(db) as schema:
        _apply(db, files[:1])
        app = read_catalogue(db, schema)
        _take_over_types(db, app)
        before = read_catalogue(db, schema)
        _apply(db, files[1:])
        made = read_catalogue(db, schema)
    # Once more as in an older project, where everything new is everybody's: what is left of that is allowed.
    with _elsewhere(db) as schema:
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
    """What a schema holds now: kind and name, with all that is compared."""
    with db.transaction():
        # The definition of a view waits for whoever holds its tables.
        db.execute("SET LOCAL lock_timeout = '1s'")
        db.execute("SET LOCAL search_path = ''")
        rows = db.execute(_READ, {"schema": schema}).fetchall()
    return {(kind, name.replace(schema, "public")): text.replace(schema, "public") for kind, name, text in rows}


def _take_over_types(db: psycopg.Connection[Any], app: Catalogue) -> None:
    """What is written about a column depends on its type: a view of a text has no cast where one of a varchar has."""
    for relation, column, found in db.execute(
        "SELECT class.relname, attribute.attname, format_type(attribute.atttypid, attribute.atttypmod) "
        "FROM pg_class AS class JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid "
        "WHERE class.relnamespace = to_regnamespace('public') AND class.relkind = 'r' AND attribute.attnum > 0"
    ).fetchall():
        made = app.get(("column", f"{relation}.{column}"), "")
        if _SERVED.match(made) and _SERVED.fullmatch(found) and not made.startswith(f"{found} "):
            alter = f'ALTER TABLE {_ELSEWHERE}."{relation}" ALTER COLUMN "{column}"'
            db.execute(f"{alter} TYPE {found} USING NULL::{found}".encode())


@contextmanager
def _elsewhere(db: psycopg.Connection[Any]) -> Iterator[str]:
    with db.transaction(force_rollback=True):
        db.execute("SET LOCAL client_min_messages = error")
        db.execute(f"CREATE SCHEMA {_ELSEWHERE}".encode())
        # The users as well: a reference to the real ones would hold up whoever signs up.
        db.execute(f"CREATE TABLE {_ELSEWHERE}.users (id uuid PRIMARY KEY)".encode())
        yield _ELSEWHERE


def _apply(db: psycopg.Connection[Any], files: Sequence[Sequence[str]]) -> None:
    for statement in (statement for statements in files for statement in statements):
        moved = _PUBLIC.sub(_ELSEWHERE, statement).replace("auth.users", f"{_ELSEWHERE}.users")
        db.execute(moved.encode())
