"""Applies sql/migrations, and the fronts that are asked for, and records them where `supabase db push` does, so that
either tool can be used.

Each file is one transaction. A lock keeps out a second run, and it retries when the app's traffic locks a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import psycopg

from daemon.database.login import connect
from daemon.errors import DatabaseAway, HostUnfit
from daemon.schema.catalogue import Expected, read_catalogue, read_expected
from daemon.schema.fit import misfits
from daemon.schema.fronts import RECORDED_AS, Front, installed_fronts, set_base_model
from daemon.schema.installation import (
    add_constraints,
    differences,
    in_words,
    inspect,
    record,
    repair_catalogue,
    repair_rows,
)
from daemon.schema.sql_script import split_statements

T = TypeVar("T")

# Any number works, as long as every migrating process uses the same one ("brightrun" in base 36, shortened).
_LOCK = 7_120_451_993
# While an ALTER waits for one reader, all writers wait behind it: give up soon (lock_timeout), try again often.
_LOCK_TRIES = 30
_LOCK_PAUSE_SECONDS = 0.5


class MayNotRead(HostUnfit):
    """This login has no right to read which migrations were applied."""


@dataclass(frozen=True)
class Migration:
    """One file. In `20261122000005_guard.sql` the version is before the underscore and the name after it."""

    version: str
    name: str
    sql: str


def migrations() -> list[Migration]:
    """Every migration that ships with this version, in order."""
    files = sorted(file.name for file in resources.files("sql.migrations").iterdir() if file.name.endswith(".sql"))
    return [
        Migration(*file.removesuffix(".sql").split("_", 1), sql=_read("sql.migrations", file))  # type: ignore[misc]
        for file in files
    ]


@dataclass(frozen=True)
class Migrated:
    """The names applied (`version_name`), descriptions of what was repaired, and what the database warned of."""

    applied: list[str]
    repaired: list[str]
    warnings: list[str]


def migrate(dsn: str, *, local: bool) -> list[str]:
    """Like `bring_up_to_date`, but returns only the names applied."""
    return bring_up_to_date(dsn, local=local).applied


def bring_up_to_date(dsn: str, *, local: bool, fronts: Sequence[Front] = (), base_model: str | None = None) -> Migrated:
    """Applies missing migrations and these fronts, then verifies everything applied so far and repairs what differs.

    `local` first adds to a plain Postgres what Supabase has (roles, auth.users, auth.uid()). `base_model` is what jobs
    that come in by these fronts are trained on.
    Raises DatabaseAway when Postgres does not answer or a table stays locked, HostUnfit when we cannot use it."""
    try:
        with connect(dsn, application_name="brightrun migrate") as db:
            warnings = _warnings_of(db)
            if local:
                _apply_local(db)
            _require_supabase(db)
            served = _fronts_here(db, fronts)
            expected = _require_fit(db, served)
            _prepare_record(db)
            _prepare_role(db)
            applied = [
                f"{migration.version}_{migration.name}" for migration in migrations() if _apply_patiently(db, migration)
            ]
            for front in fronts:
                applied += [front.recorded_as] if _apply_patiently(db, _as_migration(db, front)) else []
                if base_model is not None:
                    set_base_model(db, front, base_model)
            repaired = _patiently("the repair", lambda: _repair(db, expected, served))
            repaired += _patiently("the repair of rows", lambda: repair_rows(db))
            with db.transaction():
                db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                record(db, expected)
            return Migrated(applied, repaired, warnings)
    except psycopg.OperationalError as error:
        raise DatabaseAway(f"the migration could not be finished: {error}") from error


def _warnings_of(db: psycopg.Connection[Any]) -> list[str]:
    """Collects what migrations warn of from now on: rights that this login lacks, and what to do without them."""
    warnings: list[str] = []

    def add(notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            warnings.append("; ".join(filter(None, (notice.message_primary, notice.message_hint))))

    db.add_notice_handler(add)
    return warnings


def pending(dsn: str) -> list[str]:
    """The names of what `migrate` would apply.

    Raises DatabaseAway when Postgres does not answer, MayNotRead, and HostUnfit when the login is refused."""
    try:
        with connect(dsn, application_name="brightrun migrate") as db:
            recorded = _recorded(db)
    except psycopg.OperationalError as error:
        raise DatabaseAway(f"the database does not answer: {error}") from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise MayNotRead(f"this login may not read which migrations were applied: {error}") from error
    return [f"{item.version}_{item.name}" for item in migrations() if item.version not in recorded]


def _apply_local(db: psycopg.Connection[Any]) -> None:
    # Roles belong to the cluster: a dump from another one has the schema but not the roles.
    answer = db.execute(
        "SELECT to_regnamespace('auth') IS NOT NULL AND count(*) = 3 FROM pg_roles "
        "WHERE rolname IN ('anon', 'authenticated', 'service_role')"
    ).fetchone()
    if answer is None or answer[0]:
        return
    for file in sorted(item.name for item in resources.files("sql.local").iterdir() if item.name.endswith(".sql")):
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            for statement in split_statements(_read("sql.local", file)):
                db.execute(statement.encode())


def _require_supabase(db: psycopg.Connection[Any]) -> None:
    answer = db.execute("SELECT to_regclass('auth.users') IS NULL, current_setting('server_version_num')").fetchone()
    assert answer is not None
    if int(answer[1]) < 150000:
        raise HostUnfit(f"PostgreSQL 15 or later is needed, this one is {int(answer[1]) // 10000}")
    if answer[0]:
        raise HostUnfit(
            "there is no table auth.users here: this is not a Supabase database. "
            "For a plain Postgres run `brightrun-trainer migrate --local`"
        )


def _fronts_here(db: psycopg.Connection[Any], wanted: Sequence[Front]) -> list[Front]:
    """The fronts that are installed, and those that are to be."""
    here = {front.name: front for front in (*installed_fronts(db), *wanted)}
    return [here[name] for name in sorted(here)]


def _as_migration(db: psycopg.Connection[Any], front: Front) -> Migration:
    """A front comes after whatever is applied, so its version is the time: as the CLI names a new file."""
    now = db.execute("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISS')").fetchone()
    assert now is not None
    return Migration(now[0], front.recorded_as, front.sql)


def _require_fit(db: psycopg.Connection[Any], served: Sequence[Front]) -> Expected:
    """Refuses a database that we could not serve, before anything is changed."""
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        try:
            tables = [table for front in served for table in front.tables]
            expected = read_expected(db, _files(served), tables)
        except psycopg.errors.ObjectNotInPrerequisiteState as error:
            raise HostUnfit(f"{error.diag.message_primary}; {error.diag.message_hint}") from error
        except psycopg.DatabaseError as error:
            raise HostUnfit(f"the migrations cannot be applied here: {error}") from error
        wrong = misfits(db, expected, fresh=not _recorded(db) & {migration.version for migration in migrations()})
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise HostUnfit(f"the tables cannot be served as they are; nothing was changed:\n{listed}")
    return expected


def _files(served: Sequence[Front] = ()) -> list[list[str]]:
    return [*(split_statements(migration.sql) for migration in migrations()), *(front.statements for front in served)]


def _prepare_role(db: psycopg.Connection[Any]) -> None:
    """Creates the role, which belongs to the cluster: migrations applied in another one did not create it here."""
    with db.transaction():
        for statement in (statement for statements in _files() for statement in statements):
            if "CREATE ROLE training_daemon" in statement:
                db.execute(statement.encode())


def _repair(db: psycopg.Connection[Any], expected: Expected, served: Sequence[Front]) -> list[str]:
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        wrong = differences(expected, read_catalogue(db))
        try:
            if wrong:
                repair_catalogue(db, wrong, _files(served))
                add_constraints(db, differences(expected, read_catalogue(db)), expected)
        except psycopg.errors.LockNotAvailable:
            raise
        except psycopg.DatabaseError as error:
            listed = "; ".join(in_words(wrong))
            raise HostUnfit(f"what was found broken cannot be repaired ({error}): {listed}") from error
        left = differences(expected, read_catalogue(db))
    # The publication's owner decides what is published; that is no fault of the tables.
    if left := [difference for difference in left if difference.kind != "publication"]:
        listed = "\n".join(f"  {line}" for line in in_words(left))
        raise HostUnfit(f"the database differs from what the migrations make, and must be corrected by hand:\n{listed}")
    return in_words(wrong)


def faults(dsn: str) -> list[str] | None:
    """What `migrate` would repair here, read with the daemon's own rights. None: it has never verified this database.

    Raises DatabaseAway, MayNotRead, HostUnfit."""
    try:
        with connect(dsn, application_name="brightrun doctor") as db:
            return inspect(db)
    except psycopg.OperationalError as error:
        raise DatabaseAway(f"the database does not answer: {error}") from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise MayNotRead(f"this login may not look: {error}") from error
    except psycopg.DatabaseError as error:
        raise HostUnfit(f"the database is not as `brightrun-trainer migrate` leaves it: {error}") from error


def _recorded(db: psycopg.Connection[Any]) -> set[str]:
    """The versions that were applied, by either tool."""
    found = db.execute(
        "SELECT FROM pg_tables WHERE schemaname = 'supabase_migrations' AND tablename = 'schema_migrations'"
    ).fetchone()
    if found is None:
        return set()
    return {row[0] for row in db.execute("SELECT version FROM supabase_migrations.schema_migrations").fetchall()}


def _prepare_record(db: psycopg.Connection[Any]) -> None:
    """Creates the Supabase CLI's table with the CLI's own statements."""
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        # Look first: after waiting for the lock, CREATE still sees the catalogue as it was before the wait.
        if db.execute("SELECT FROM pg_namespace WHERE nspname = 'supabase_migrations'").fetchone() is None:
            db.execute("CREATE SCHEMA supabase_migrations")
        db.execute(
            "CREATE TABLE IF NOT EXISTS supabase_migrations.schema_migrations (version text NOT NULL PRIMARY KEY)"
        )
        db.execute("ALTER TABLE supabase_migrations.schema_migrations ADD COLUMN IF NOT EXISTS statements text[]")
        db.execute("ALTER TABLE supabase_migrations.schema_migrations ADD COLUMN IF NOT EXISTS name text")


def _apply_patiently(db: psycopg.Connection[Any], migration: Migration) -> bool:
    return _patiently(f"{migration.version}_{migration.name}", lambda: _apply(db, migration))


def _patiently(what: str, change: Callable[[], T]) -> T:
    for tries_left in reversed(range(_LOCK_TRIES)):
        try:
            return change()
        except psycopg.errors.LockNotAvailable as error:
            if tries_left == 0:
                raise DatabaseAway(
                    f"{what}: a table stayed locked for "
                    f"{_LOCK_TRIES} tries; end the long transaction that holds it (pg_stat_activity) and run it again"
                ) from error
            time.sleep(_LOCK_PAUSE_SECONDS)
    raise AssertionError("the last try returns or raises")


def _apply(db: psycopg.Connection[Any], migration: Migration) -> bool:
    statements = split_statements(migration.sql)
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        done = db.execute(
            "SELECT 1 FROM supabase_migrations.schema_migrations WHERE version = %s OR name = %s",
            (migration.version, migration.name if migration.name.startswith(RECORDED_AS) else None),
        ).fetchone()
        if done is not None:
            return False
        for statement in statements:
            try:
                db.execute(statement.encode())
            except psycopg.errors.LockNotAvailable:
                raise
            except psycopg.DatabaseError as error:
                first_line = next(line for line in statement.splitlines() if not line.startswith("--") and line.strip())
                raise HostUnfit(
                    f"migration {migration.version}_{migration.name} failed at `{first_line.strip()}`: {error}"
                ) from error
        db.execute(
            "INSERT INTO supabase_migrations.schema_migrations (version, statements, name) VALUES (%s, %s, %s)",
            (migration.version, statements, migration.name),
        )
    return True


def _read(package: str, file: str) -> str:
    return (resources.files(package) / file).read_text(encoding="utf-8")
