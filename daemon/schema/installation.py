"""Checks whether a database is still as `migrate` left it, and repairs it.

A dump restored into another project lacks the role, and with it grants, policies and owners of functions. A restore
with triggers off leaves rows that no claim sees. The record of applied migrations is restored as well and says that
everything is applied, so this compares the catalogue and counts the rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psycopg

from daemon.schema.catalogue import Catalogue, Expected, read_catalogue

ROLE = "training_daemon"
_RECORD = "supabase_migrations.brightrun_trainer"
# Where the rows are: the server, its timeline, the database, the table. A copy differs in one of them.
_PLACE = """
    SELECT concat_ws('/',
        (SELECT system_identifier FROM pg_control_system()), (SELECT timeline_id FROM pg_control_checkpoint()),
        (SELECT oid FROM pg_database WHERE datname = current_database()), 'public.training_leases'::regclass::oid)
"""
# The order matters: end stray leases first, so that they are not taken for leases that a run lost.
_ROWS = {
    "end_stray_leases": "leases of no run",
    "return_restored_leases": "leases that ran out before the rows came here",
    "return_jobs_without_lease": "jobs that say they run though nobody holds them",
    "queue_unseen_jobs": "queued jobs that no claim can see",
}
_SEQUENCES = (
    ("training_events", "id"),
    ("training_fleet_decisions", "id"),
    ("training_callbacks", "sequence"),
)
_MANY = 4
_ONE_COLUMN = re.compile(
    r"CREATE INDEX \w+ ON (?P<table>\S+) USING btree \((?P<column>\w+)\)(?: WHERE \((?P=column) IS NOT NULL\))?"
)


@dataclass(frozen=True)
class Difference:
    """One object of ours that differs from what the migrations create."""

    kind: str
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.what}"


def differences(expected: Expected, found: Catalogue) -> list[Difference]:
    """Finds everything that is missing, changed, or accessible to a role that should have no access."""
    return [*_wrong_things(expected, found), *_open_doors(expected, found)]


def _wrong_things(expected: Expected, found: Catalogue) -> Iterator[Difference]:
    for (kind, name), definition in expected.ours.items():
        is_now = found.get((kind, name))
        if is_now == definition:
            continue
        if is_now is None:
            if not (kind == "index" and _another_serves(definition, found)):
                yield Difference(kind, name, "is missing")
        elif (kind, name) in expected.app and kind == "function":
            continue  # the app has made it, or we have: both do
        elif (kind, name) in expected.app and kind == "column":
            # The column is the app's. We only require that it has some default.
            if " default " not in f" {is_now}":
                yield Difference(kind, name, "has no default")
        elif is_now.endswith(" (switched off)"):
            yield Difference(kind, name, "is switched off")
        elif is_now.endswith(" (foreign keys)"):
            yield Difference(kind, name, "does not check its foreign keys")
        elif kind == "table":
            yield Difference(kind, name, "has its row security switched off")
        else:
            yield Difference(kind, name, "is another one")


def _another_serves(definition: str, found: Catalogue) -> bool:
    """Whether the app's own index, under another name, does what an index of ours on one column would do."""
    ours = _ONE_COLUMN.fullmatch(definition)
    if ours is None:
        return False
    whole = rf"CREATE (?:UNIQUE )?INDEX .+ ON {re.escape(ours['table'])} USING btree \({ours['column']}\b"
    return any(
        kind == "index"
        and re.match(whole, text) is not None
        and not text.endswith(" (invalid)")
        and (" WHERE " not in text or text.endswith(f" WHERE ({ours['column']} IS NOT NULL)"))
        for (kind, _name), text in found.items()
    )


def _open_doors(expected: Expected, found: Catalogue) -> Iterator[Difference]:
    known = {_thing(name) for name in expected.admitted}
    for kind, name in found:
        if (
            kind == "right"
            and name not in expected.admitted
            and _thing(name) in known
            and not name.endswith(f" {ROLE}")
        ):
            yield Difference(kind, name, "should not be there")


def _thing(right: str) -> str:
    return right.rpartition(": ")[0].partition(".")[0]


def in_words(found: Sequence[Difference]) -> list[str]:
    """One line for each difference, or one for all of a kind if there are many."""
    lines = []
    for kind in dict.fromkeys(difference.kind for difference in found):
        alike = [difference for difference in found if difference.kind == kind]
        if len(alike) > _MANY:
            named = ", ".join(difference.name for difference in alike[:_MANY])
            lines.append(f"{len(alike)} {kind}s, among them {named}")
        else:
            lines += map(str, alike)
    return lines


def repair_catalogue(db: psycopg.Connection[Any], wrong: Sequence[Difference], files: Sequence[Sequence[str]]) -> None:
    """Recreates our objects, in the caller's transaction. The app's own triggers and policies stay as they are."""
    for difference in wrong:
        if difference.what == "is another one" and difference.kind in ("index", "view"):
            # CREATE INDEX IF NOT EXISTS accepts any index of that name, and REPLACE cannot drop a view's column.
            db.execute(f'DROP {difference.kind} public."{difference.name}"'.encode())
        if difference.what == "does not check its foreign keys":
            _check_references(db, difference.name)
        if (difference.kind, difference.name) == ("trigger", "training_jobs.training_jobs_guard_update"):
            # If the guard is missing, its migration takes all waiting jobs for older ones and holds them: put a dummy.
            db.execute(
                b"CREATE OR REPLACE TRIGGER training_jobs_guard_update BEFORE UPDATE ON public.training_jobs "
                b"FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
            )
    for statement in (statement for statements in files for statement in statements):
        db.execute(statement.encode())


def _check_references(db: psycopg.Connection[Any], relation: str) -> None:
    """Enables foreign-key triggers that a restore left off, one by one: the app's own may be off on purpose."""
    for (trigger,) in db.execute(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = %s::regclass AND tgisinternal AND tgenabled <> 'O'",
        (f"public.{relation}",),
    ).fetchall():
        db.execute(f'ALTER TABLE public."{relation}" ENABLE TRIGGER "{trigger}"'.encode())


def add_constraints(db: psycopg.Connection[Any], wrong: Sequence[Difference], expected: Expected) -> None:
    """Adds the constraints that CREATE TABLE IF NOT EXISTS does not add to an existing table."""
    for difference in wrong:
        if difference.kind == "constraint":
            relation, _, name = difference.name.partition(".")
            table = f'ALTER TABLE public."{relation}"'
            if difference.what != "is missing":
                db.execute(f'{table} DROP CONSTRAINT "{name}"'.encode())
            definition = expected.ours[difference.kind, difference.name]
            db.execute(f'{table} ADD CONSTRAINT "{name}" {definition}'.encode())


def repair_rows(db: psycopg.Connection[Any]) -> list[str]:
    """Repairs rows after a restore, as the daemon's role, so that the guard checks it. Returns what was found."""
    lines: list[str] = []
    since = _here_since(db)
    with db.transaction():
        db.execute(b"SET LOCAL lock_timeout = '1s'")
        for relation, column in _SEQUENCES:
            lines += _advance(db, relation, column)
        db.execute(f"SET LOCAL ROLE {ROLE}".encode())
        for name, words in _ROWS.items():
            rows = db.execute(_statement(name), {"since": since}).rowcount
            lines += [f"{rows} {words}"] if rows else []
        db.execute(b"RESET ROLE")
    return lines


def _advance(db: psycopg.Connection[Any], relation: str, column: str) -> Iterator[str]:
    found = db.execute(
        f"SELECT setval(sequence, highest) FROM (SELECT max({column}) AS highest, "
        f"pg_get_serial_sequence('public.{relation}', '{column}') AS sequence FROM public.{relation}) AS numbers "
        "WHERE highest > coalesce(pg_sequence_last_value(sequence::regclass), 0)".encode()
    ).fetchone()
    if found is not None:
        yield f"the numbers of {relation}, which began again below {found[0]}"


def record(db: psycopg.Connection[Any], expected: Expected) -> None:
    """Stores what is expected, for roles that cannot compute it themselves, and where the rows are."""
    things = {
        name: [[*key, definition] for key, definition in catalogue.items()]
        for name, catalogue in (("ours", expected.ours), ("app", expected.app))
    }
    with db.transaction():
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {_RECORD} (one boolean PRIMARY KEY DEFAULT true CHECK (one), server integer "
            "NOT NULL, place text NOT NULL, here_since timestamptz NOT NULL, expected jsonb NOT NULL)".encode()
        )
        db.execute(f"GRANT USAGE ON SCHEMA supabase_migrations TO {ROLE}".encode())
        db.execute(f"GRANT SELECT ON {_RECORD} TO {ROLE}".encode())
        db.execute(
            f"INSERT INTO {_RECORD} AS was VALUES (true, %s, ({_PLACE}), clock_timestamp(), %s) "
            "ON CONFLICT (one) DO UPDATE SET server = excluded.server, place = excluded.place, "
            "here_since = CASE WHEN was.place = excluded.place THEN was.here_since ELSE excluded.here_since END, "
            "expected = excluded.expected".encode(),
            (db.info.server_version // 10_000, json.dumps(things | {"admitted": sorted(expected.admitted)})),
        )


def inspect(db: psycopg.Connection[Any]) -> list[str] | None:
    """What `migrate` would repair, read with the daemon's own rights. None: it has never verified this database."""
    db.execute(f"SET ROLE {ROLE}".encode())
    found = db.execute(b"SELECT FROM pg_tables WHERE schemaname || '.' || tablename = %s", (_RECORD,)).fetchone()
    row = None if found is None else db.execute(f"SELECT server, expected FROM {_RECORD}".encode()).fetchone()
    if row is None or row[0] != db.info.server_version // 10_000:
        return None
    ours, app = ({(kind, name): text for kind, name, text in row[1][catalogue]} for catalogue in ("ours", "app"))
    expected = Expected(ours, app, frozenset(row[1]["admitted"]))
    counts = db.execute(_statement("count_wrong_rows"), {"since": _here_since(db)})
    names = [column.name for column in counts.description or ()]
    numbers = dict(zip(names, counts.fetchone() or (), strict=True))
    return [
        *in_words(differences(expected, read_catalogue(db))),
        *(f"{numbers[name]} {words}" for name, words in _ROWS.items() if numbers[name]),
    ]


def _here_since(db: psycopg.Connection[Any]) -> str:
    """When the rows arrived in this database; an older lease was claimed elsewhere. `infinity`: just now."""
    if db.execute(b"SELECT FROM pg_tables WHERE schemaname || '.' || tablename = %s", (_RECORD,)).fetchone() is None:
        return "infinity"
    row = db.execute(f"SELECT here_since::text FROM {_RECORD} WHERE place = ({_PLACE})".encode()).fetchone()
    return "infinity" if row is None else str(row[0])


def _statement(name: str) -> bytes:
    return (resources.files("sql.repairs") / f"{name}.sql").read_bytes()
