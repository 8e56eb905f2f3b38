"""What Postgres really allows: each role tries each verb on each column of each table, and each function.

Every try runs in a savepoint of one transaction and is undone; whether a write that was accepted had an effect is
looked up as the superuser, because the guard may accept a value and put its own in its place.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

# Who tries. "own" and "other" are both `authenticated`: the owner of the row, and somebody else.
CALLERS = ("anon", "other", "own", "service", "daemon")
_ROLES = {"own": "authenticated", "other": "authenticated", "service": "service_role", "daemon": "training_daemon"}

# Refused by a missing grant or a policy, or by the guard: what a caller is told is asserted elsewhere.
_REFUSALS = ("42501", "PT409", "PT404", "PT503")
_NEVER = ("428C9",)  # an identity column that takes no value from anybody


@dataclass(frozen=True)
class Target:
    """A table with one row of the owner's to try on. `fresh` holds what a new row needs at least; None: no insert."""

    title: str
    table: str
    key: Mapping[str, Any]
    fresh: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class World:
    """The rows that there are, and a valid other value for the columns that not every value fits."""

    owner: UUID
    stranger: UUID
    targets: tuple[Target, ...]
    other_values: Mapping[str, Any]


class Prober:
    """Tries things as somebody, in one transaction that never commits."""

    def __init__(self, connection: psycopg.Connection[dict[str, Any]], world: World) -> None:
        self._db = connection
        self._world = world

    @contextmanager
    def _undone(self) -> Iterator[None]:
        self._db.execute("SAVEPOINT try")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK TO SAVEPOINT try")

    def _become(self, caller: str) -> None:
        claims = {"own": self._world.owner, "other": self._world.stranger}
        subject = {"sub": str(claims[caller])} if caller in claims else {}
        role = _ROLES.get(caller, caller)
        self._db.execute("SELECT set_config('request.jwt.claims', %s, true)", (json.dumps({"role": role} | subject),))
        self._db.execute("SELECT set_config('role', %s, true)", (role,))

    def _stand_back(self) -> None:
        self._db.execute("SELECT set_config('role', 'none', true)")

    def reads(self, caller: str, target: Target, column: str) -> str:
        """`r` when the row's column is seen."""
        where, values = _where(target.key)
        statement = sql.SQL("SELECT {} FROM {} WHERE {}").format(
            sql.Identifier(column), sql.Identifier("public", target.table), where
        )
        with self._undone():
            self._become(caller)
            try:
                found = self._db.execute(statement, values).fetchall()
            except psycopg.Error as error:
                return _refused(error)
            return "r" if found else "."

    def inserts(self, caller: str, target: Target, column: str, kind: str) -> str:
        """`i` when a new row keeps the value that was sent, `(i)` when another one is put in its place."""
        if target.fresh is None:
            return "."
        sent = target.fresh.get(column)
        if sent is None:
            sent = self._other_value(target, column, kind)
        row = dict(target.fresh) | {column: sent}
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier("public", target.table),
            sql.SQL(", ").join(map(sql.Identifier, row)),
            sql.SQL(", ").join(map(sql.Placeholder, row)),
        )
        with self._undone():
            before = self._keys(target)
            self._become(caller)
            try:
                self._db.execute(statement, _adapted(row))
            except psycopg.Error as error:
                return _refused(error)
            self._stand_back()
            made = [row for row in self._rows(target) if _key_of(target, row) not in before]
            assert len(made) == 1, f"{caller} inserted {len(made)} rows into {target.table}"
            return "i" if _same(made[0][column], sent.obj if isinstance(sent, Jsonb) else sent) else "(i)"

    def updates(self, caller: str, target: Target, column: str, kind: str) -> str:
        """`u` when the row has the new value, `(u)` when the guard or a constraint keeps the old one."""
        sent = self._other_value(target, column, kind)
        where, values = _where(target.key)
        statement = sql.SQL("UPDATE {} SET {} = %(sent)s WHERE {}").format(
            sql.Identifier("public", target.table), sql.Identifier(column), where
        )
        with self._undone():
            before = self._rows(target)
            self._become(caller)
            try:
                touched = self._db.execute(statement, _adapted({"sent": sent}) | values).rowcount
            except (psycopg.errors.ForeignKeyViolation, psycopg.errors.CheckViolation):
                return "(u)"
            except psycopg.Error as error:
                return _refused(error)
            self._stand_back()
            if not touched:
                return "."
            after = self._rows(target)
            changed = [row[column] for row in after] != [row[column] for row in before]
            return "u" if changed else "(u)"

    def deletes(self, caller: str, target: Target) -> str:
        """`d` when the row is gone, `(d)` when only a foreign key keeps it."""
        where, values = _where(target.key)
        statement = sql.SQL("DELETE FROM {} WHERE {}").format(sql.Identifier("public", target.table), where)
        with self._undone():
            self._become(caller)
            try:
                touched = self._db.execute(statement, values).rowcount
            # From PostgreSQL 18 on, a key that restricts has a code of its own.
            except (psycopg.errors.ForeignKeyViolation, psycopg.errors.RestrictViolation):
                return "(d)"
            except psycopg.Error as error:
                return _refused(error)
            return "d" if touched else "."

    def calls(self, caller: str, call: str, values: Mapping[str, Any]) -> str:
        """`x` when the call is carried out, `-` when it is refused by its own check, `.` when it may not be made."""
        with self._undone():
            self._become(caller)
            try:
                self._db.execute(f"SELECT * FROM {call}".encode(), values).fetchall()
            except psycopg.errors.InsufficientPrivilege:
                return "."
            except psycopg.Error as error:
                if error.sqlstate in ("PT404", "PT400"):
                    return "-"
                raise
            return "x"

    def sees(self, caller: str, view: str) -> str:
        """`all`, `own` or nothing of the rows of a view that has rows of both users."""
        with self._undone():
            everything = self._db.execute(f"SELECT count(*) AS n FROM {view}".encode()).fetchall()[0]["n"]
            self._become(caller)
            try:
                seen = self._db.execute(f"SELECT count(*) AS n FROM {view}".encode()).fetchall()[0]["n"]
            except psycopg.errors.InsufficientPrivilege:
                return "."
            assert everything > 1, f"{view} has {everything} rows: nothing is shown by them"
            return "all" if seen == everything else "own" if seen else "none"

    def _rows(self, target: Target) -> list[dict[str, Any]]:
        order = sql.SQL(", ").join(map(sql.Identifier, target.key))
        return self._db.execute(
            sql.SQL("SELECT * FROM {} ORDER BY {}").format(sql.Identifier("public", target.table), order)
        ).fetchall()

    def _keys(self, target: Target) -> set[Any]:
        return {_key_of(target, row) for row in self._rows(target)}

    def _other_value(self, target: Target, column: str, kind: str) -> Any:
        for name in (f"{target.title}.{column}", f"{target.table}.{column}", column):
            if name in self._world.other_values:
                return self._world.other_values[name]
        return _OF_KIND[kind]


_OF_KIND: Mapping[str, Any] = {
    "uuid": UUID("00000000-0000-4000-8000-00000000000a"),
    "text": "tried",
    "character varying": "tried",
    "integer": 7,
    "bigint": 7,
    "smallint": 7,
    "numeric": 7,
    "double precision": 7.0,
    "boolean": True,
    "jsonb": {"tried": True},
    "ARRAY": ["tried"],
    "date": date(2031, 1, 1),
    "timestamp with time zone": datetime(2031, 1, 1, tzinfo=UTC) + timedelta(hours=1),
}


def columns_of(connection: psycopg.Connection[dict[str, Any]], table: str) -> list[tuple[str, str]]:
    """(name, type) of a table's columns, in their order."""
    rows = connection.execute(
        "SELECT column_name AS name, data_type AS kind FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name = %s ORDER BY ordinal_position",
        (table,),
    ).fetchall()
    assert rows, f"no table {table}"
    return [(row["name"], row["kind"]) for row in rows]


def table_lines(connection: psycopg.Connection[dict[str, Any]], world: World) -> list[str]:
    """The matrix of tables: for each a line for every set of columns with the same rights."""
    prober = Prober(connection, world)
    lines = []
    for target in world.targets:
        deleting = [prober.deletes(caller, target) for caller in CALLERS]
        rights: dict[tuple[str, ...], list[str]] = {tuple(deleting): ["(the row)"]}
        for column, kind in columns_of(connection, target.table):
            cells = tuple(
                _joined(
                    prober.reads(caller, target, column),
                    prober.inserts(caller, target, column, kind),
                    prober.updates(caller, target, column, kind),
                )
                for caller in CALLERS
            )
            rights.setdefault(cells, []).append(column)
        lines += ["", target.title]
        for cells, names in rights.items():
            lines += row(cells, ", ".join(names))
    return lines


def row(cells: Iterable[str], names: str) -> list[str]:
    """One set of rights and who has it on what; a long list of names goes on below itself."""
    left = "  " + "".join(f"{cell:<9}" for cell in cells)
    first, *more = textwrap.wrap(names, 110 - len(left))
    return [left + first] + [" " * len(left) + line for line in more]


def heading() -> str:
    return "  " + "".join(f"{caller:<9}" for caller in CALLERS).rstrip()


def _joined(*letters: str) -> str:
    return "".join(letter for letter in letters if letter != ".") or "."


def _where(key: Mapping[str, Any]) -> tuple[sql.Composable, dict[str, Any]]:
    parts = [sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(f"key_{name}")) for name in key]
    return sql.SQL(" AND ").join(parts), {f"key_{name}": value for name, value in key.items()}


def _key_of(target: Target, row: Mapping[str, Any]) -> Any:
    return tuple(row[name] for name in target.key)


def _adapted(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: Jsonb(value) if isinstance(value, dict) else value for name, value in row.items()}


def _same(stored: Any, sent: Any) -> bool:
    return bool(stored == sent)


def _refused(error: psycopg.Error) -> str:
    """A refusal is a dot; anything else would be a mistake of the try itself."""
    if error.sqlstate in (*_REFUSALS, *_NEVER):
        return "."
    raise AssertionError(f"neither allowed nor refused: {type(error).__name__} {error}") from error
