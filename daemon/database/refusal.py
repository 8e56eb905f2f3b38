"""Explains an error from Postgres: our tables are missing, or a statement was refused, and by which function."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

import psycopg

from daemon.errors import StatementRefused

# Errors of a database that was never migrated, or that has an older version.
NOT_MIGRATED = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedObject,
    psycopg.errors.InvalidSchemaName,
)
# In an error's context: `PL/pgSQL function app.audit() line 3 at RAISE`, `SQL function "audit" statement 1`.
_FUNCTION = re.compile(r"^(?:PL/\w+|SQL) function \"?([\w.$]+)\"?", re.MULTILINE)
_CREATED = re.compile(r"^CREATE OR REPLACE FUNCTION public\.(\w+)", re.MULTILINE)


def refusal_of(error: psycopg.Error) -> StatementRefused:
    """The database's message, and the function that raised it."""
    return StatementRefused(first_line(error), who=_who(error), sqlstate=error.sqlstate)


def is_of_the_app(error: BaseException) -> bool:
    """Whether a function that is not ours raised it, such as a trigger of the app that lacks a right."""
    return isinstance(error, psycopg.Error) and any(name not in _own_functions() for name in _functions(error))


def _who(error: psycopg.Error) -> str | None:
    diag = error.diag
    foreign = [name for name in _functions(error) if name not in _own_functions()]
    parts = [
        f"function {foreign[0]}" if foreign else None,
        f"constraint {diag.constraint_name}" if diag.constraint_name else None,
        f"column {diag.column_name}" if diag.column_name else None,
        f"table {diag.table_name}" if diag.table_name else None,
    ]
    return ", ".join(part for part in parts if part) or None


def first_line(error: BaseException) -> str:
    """The error's first line, without Postgres' excerpt of the statement."""
    said = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return (said or str(error)).strip().split("\n", 1)[0] or type(error).__name__


def _functions(error: psycopg.Error) -> list[str]:
    """The functions in the error's context, innermost first, without the schema that ours are in."""
    return [name.removeprefix("public.") for name in _FUNCTION.findall(error.diag.context or "")]


@cache
def _own_functions() -> frozenset[str]:
    files = sorted(file.name for file in resources.files("sql.migrations").iterdir() if file.name.endswith(".sql"))
    texts = ((resources.files("sql.migrations") / name).read_text(encoding="utf-8") for name in files)
    return frozenset(name for text in texts for name in _CREATED.findall(text)) | {"inline_code_block"}
