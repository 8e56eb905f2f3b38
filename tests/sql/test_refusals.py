"""What Postgres refuses, and who it says did: a trigger of the app's own is not a missing migration."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from daemon.database import Database
from daemon.errors import HostUnfit, StatementRefused
from daemon.store import Limits, Store
from tests.postgres import AppDatabase

# What an app does beside each move of a job, and how that fails.
APP_TRIGGERS = {
    "raises": "RAISE EXCEPTION 'not in this house'",
    "lacks a right": "INSERT INTO audit VALUES (1)",
    "lacks a table": "INSERT INTO nowhere VALUES (1)",
    "lacks a column": "PERFORM NEW.nothing_of_that_name",
    "calls our function": "PERFORM public.training_require_owner(NULL); PERFORM 1 / 0",
}


def app_trigger(database: AppDatabase, body: str) -> None:
    database.run(
        "CREATE TABLE audit (id integer); CREATE FUNCTION app_audit() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {body}; RETURN NEW; END $$;"
        "CREATE TRIGGER app_audit AFTER UPDATE ON training_jobs FOR EACH ROW EXECUTE FUNCTION app_audit()"
    )


@pytest.mark.parametrize("body", APP_TRIGGERS.values(), ids=list(APP_TRIGGERS))
async def test_a_refusal_inside_the_apps_trigger_names_it_and_is_no_missing_migration(
    database: AppDatabase, store: Store, user: UUID, body: str
) -> None:
    database.insert_job(user)
    app_trigger(database, body)
    with pytest.raises(StatementRefused, match=r"function app_audit") as refused:
        await store.claim_job(uuid4(), Limits(), lease_seconds=60)
    assert "migrate" not in str(refused.value)


async def test_a_refusal_names_the_apps_constraint(database: AppDatabase, store: Store, user: UUID) -> None:
    database.insert_job(user)
    database.run("ALTER TABLE training_jobs ADD CONSTRAINT app_statuses CHECK (status <> 'initializing')")
    with pytest.raises(StatementRefused, match=r"constraint app_statuses.*table training_jobs") as refused:
        await store.claim_job(uuid4(), Limits(), lease_seconds=60)
    assert refused.value.sqlstate == "23514"


@pytest.mark.parametrize(
    "taken_away",
    [
        "REVOKE UPDATE ON training_jobs FROM training_daemon",
        # Missed inside a function of ours, on the claim's way.
        "REVOKE INSERT ON training_events FROM training_daemon",
        "ALTER TABLE training_events RENAME TO gone",
    ],
)
async def test_what_we_lack_ourselves_is_still_a_missing_migration(
    database: AppDatabase, store: Store, user: UUID, taken_away: str
) -> None:
    database.insert_job(user)
    database.run(taken_away)
    with pytest.raises(HostUnfit, match="brightrun-trainer migrate"):
        await store.claim_job(uuid4(), Limits(), lease_seconds=60)


async def test_a_refused_statement_leaves_the_connection_as_it_was(database: AppDatabase) -> None:
    async with Database(database.dsn, application_name="test") as connection:
        pid = await connection.fetch("SELECT pg_backend_pid() AS pid")
        with pytest.raises(StatementRefused, match="division by zero"):
            await connection.fetch("SELECT 1 / 0")
        assert await connection.fetch("SELECT pg_backend_pid() AS pid") == pid
