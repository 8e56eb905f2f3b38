"""The fronts that ship with this version: optional migrations that make another table of the app a front of the queue.

A front is recorded beside the migrations as `front_NAME`. `supabase db push` does the same with a copy of the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psycopg

from daemon.database.connection import Database
from daemon.schema.sql_script import split_statements

RECORDED_AS = "front_"
_TABLES = re.compile(r"^-- front of: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Front:
    """One file of sql/fronts. `tables` are the tables of the app that it needs, the one for jobs first."""

    name: str
    sql: str
    tables: tuple[str, ...]

    @property
    def statements(self) -> list[str]:
        return split_statements(self.sql)

    @property
    def recorded_as(self) -> str:
        return f"{RECORDED_AS}{self.name}"


@dataclass(frozen=True)
class FrontState:
    """What a database has of a front. `faults` is what the app's tables lack, `lags` counts rows not yet written."""

    front: Front
    has_table: bool
    installed: bool
    base_model: str | None = None
    faults: tuple[str, ...] = ()
    lags: int = 0


def fronts() -> dict[str, Front]:
    """Every front that ships with this version, by name."""
    found = {}
    for file in sorted(resources.files("sql.fronts").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".sql"):
            text = file.read_text(encoding="utf-8")
            named = _TABLES.search(text)
            assert named is not None, f"{file.name} does not name its tables"
            name = file.name.removesuffix(".sql")
            found[name] = Front(name, text, tuple(table.strip() for table in named[1].split(",")))
    return found


def installed_fronts(db: psycopg.Connection[Any]) -> list[Front]:
    """The fronts that are here, by the record or by what they have made. Without their tables there is nothing to
    verify."""
    recorded = _recorded_names(db)
    return [
        front
        for front in fronts().values()
        if (front.recorded_as in recorded or _has_function(db, front))
        and all(_has_table(db, table) for table in front.tables)
    ]


def set_base_model(db: psycopg.Connection[Any], front: Front, base_model: str) -> None:
    """Sets the base model of the jobs that will come in by a front."""
    db.execute("UPDATE public.training_fronts SET base_model = %s WHERE front = %s", (base_model, front.name))


async def read_fronts(database: Database) -> list[FrontState]:
    """What there is of each front, with the daemon's own rights."""
    states = []
    for front in fronts().values():
        found = await database.fetch(
            "SELECT to_regclass('public.' || %(table)s) IS NOT NULL AS has_table, "
            "EXISTS (SELECT FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname = %(function)s) "
            "AS installed",
            {"table": front.tables[0], "function": _function(front)},
        )
        has_table, installed = found[0]["has_table"], found[0]["installed"]
        if not installed:
            states.append(FrontState(front, has_table, installed))
            continue
        rows = await database.fetch(
            "SELECT (SELECT base_model FROM training_fronts WHERE front = %(front)s) AS base_model, "
            f"ARRAY(SELECT training_{front.name}_faults()) AS faults, "
            "(SELECT count(*) FROM training_front_lags WHERE front = %(front)s) AS lags",
            {"front": front.name},
        )
        states.append(
            FrontState(front, has_table, installed, rows[0]["base_model"], tuple(rows[0]["faults"]), rows[0]["lags"])
        )
    return states


def _recorded_names(db: psycopg.Connection[Any]) -> set[str]:
    if db.execute("SELECT WHERE to_regclass('supabase_migrations.schema_migrations') IS NOT NULL").fetchone() is None:
        return set()
    # As JSON: in older versions of the CLI the table had no names.
    rows = db.execute("SELECT to_jsonb(one) ->> 'name' FROM supabase_migrations.schema_migrations AS one").fetchall()
    return {row[0] for row in rows}


def _has_function(db: psycopg.Connection[Any], front: Front) -> bool:
    return (
        db.execute(
            "SELECT FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname = %s", (_function(front),)
        ).fetchone()
        is not None
    )


def _has_table(db: psycopg.Connection[Any], table: str) -> bool:
    return db.execute("SELECT WHERE to_regclass('public.' || %s) IS NOT NULL", (table,)).fetchone() is not None


def _function(front: Front) -> str:
    """The function that makes a front what it is."""
    return f"training_{front.name}_mirror"
