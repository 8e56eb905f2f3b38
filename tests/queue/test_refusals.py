"""What Postgres refuses, and who it says did: a trigger of the app's own is not a missing migration."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from daemon.database.connection import Database
from daemon.errors import HostUnfit, StatementRefused
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from daemon.report.outbox import SqlOutbox
from tests.postgres import AppDatabase
from tests.sql.world import held

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
    database: AppDatabase, store: SqlJobStore, user: UUID, body: str
) -> None:
    database.insert_job(user)
    app_trigger(database, body)
    with pytest.raises(StatementRefused, match=r"function app_audit") as refused:
        await store.claim_job(uuid4(), Limits(), lease_seconds=60)
    assert "migrate" not in str(refused.value)


async def test_a_refusal_names_the_apps_constraint(database: AppDatabase, store: SqlJobStore, user: UUID) -> None:
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
    database: AppDatabase, store: SqlJobStore, user: UUID, taken_away: str
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


# -- one bad row holds up no other ------------------------------------------------------------------------------------


def refuse(database: AppDatabase, table: str, row_id: UUID, *, column: str = "id", events: str = "UPDATE") -> None:
    database.run(
        "CREATE FUNCTION app_objects() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'not this one'; END $$"
    )
    database.run(
        f"CREATE TRIGGER app_objects BEFORE {events} ON {table} FOR EACH ROW "
        f"WHEN (OLD.{column} = '{row_id}') EXECUTE FUNCTION app_objects()"
    )


def mend(database: AppDatabase) -> None:
    database.run("DROP FUNCTION app_objects() CASCADE")


async def lost(store: SqlJobStore, database: AppDatabase, user: UUID) -> UUID:
    """A job whose host died a while ago."""
    job_id = database.insert_job(user)
    assert (await store.claim_job(uuid4(), Limits(), lease_seconds=0.1)).job is not None
    database.run(
        "UPDATE training_leases SET heartbeat_at = heartbeat_at - interval '1 day', "
        "expires_at = expires_at - interval '1 day' WHERE job_id = %s",
        (job_id,),
    )
    return job_id


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "at the end of the transaction"])
async def test_a_job_whose_requeue_is_refused_stops_the_reaping_of_no_other(
    database: AppDatabase, store: SqlJobStore, user: UUID, deferred: bool
) -> None:
    before, bad, after = [await lost(store, database, user) for _ in range(3)]
    if deferred:
        database.run(
            "CREATE FUNCTION app_objects() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION 'not this one'; END $$"
        )
        database.run(
            "CREATE CONSTRAINT TRIGGER app_objects AFTER UPDATE ON training_jobs DEFERRABLE INITIALLY DEFERRED "
            f"FOR EACH ROW WHEN (OLD.id = '{bad}') EXECUTE FUNCTION app_objects()"
        )
    else:
        refuse(database, "training_jobs", bad)
    for _ in range(2):
        reaped = {each.job_id: each.state for each in await store.reap_expired_leases()}
        assert reaped.pop(bad) == "initializing"
    assert [database.job(job_id)["status"] for job_id in (before, bad, after)] == ["queued", "initializing", "queued"]
    said = database.one("SELECT message FROM training_events WHERE job_id = %s AND kind = 'notice'", (bad,))
    assert "not this one" in said["message"]
    mend(database)
    assert [each.job_id for each in await store.reap_expired_leases()] == [bad]


async def test_a_scheduled_job_that_is_refused_keeps_no_other_from_its_time(
    database: AppDatabase, store: SqlJobStore, user: UUID
) -> None:
    jobs = [database.insert_job(user, run_after="2999-01-01") for _ in range(3)]
    with database.connect() as past, past.transaction():
        past.execute("SET LOCAL session_replication_role = replica")
        past.execute("UPDATE training_jobs SET run_after = now() - interval '1 minute'")
    refuse(database, "training_jobs", jobs[0])
    assert await store.promote_due_jobs() == 2
    assert [database.job(job_id)["due"] for job_id in jobs] == [False, True, True]
    # It is left alone for a while: the daemon sleeps, and says so.
    assert await store.next_due_in() is None and await store.promote_due_jobs() == 0
    assert [each["name"] for each in store.troubles.as_json()] == ["promotion"]


async def test_a_callback_that_is_refused_keeps_no_other(database: AppDatabase, store: SqlJobStore, user: UUID) -> None:
    outbox = SqlOutbox(store.database, store.troubles)
    for host in ("a", "a", "b"):
        job_id = database.insert_job(user, callback_url=f"https://{host}.example.org/hook")
        database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
    rows = database.run("SELECT id FROM training_callbacks ORDER BY sequence")
    bad, *others = [row["id"] for row in rows]
    refuse(database, "training_callbacks", bad)
    assert {each.id for each in await outbox.claim_callbacks(10, 60.0)} == set(others)
    assert [each["name"] for each in store.troubles.as_json()] == ["callback"]
    assert await outbox.claim_callbacks(10, 60.0) == []


async def test_an_unanswered_claim_that_cannot_go_back_keeps_no_other(
    database: AppDatabase, store: SqlJobStore, user: UUID
) -> None:
    worker = uuid4()
    jobs = [database.insert_job(user) for _ in range(4)]
    for _ in jobs:
        assert (await store.claim_job(worker, Limits(), lease_seconds=60)).job is not None
    refuse(database, "training_jobs", jobs[0])
    assert await store.return_unanswered_claims(worker, [jobs[3]]) == 2
    assert [database.job(job_id)["status"] for job_id in jobs] == ["initializing", "queued", "queued", "initializing"]


async def test_held_jobs_are_released_beside_one_that_cannot_be(
    database: AppDatabase, store: SqlJobStore, user: UUID
) -> None:
    jobs = [held(database, user) for _ in range(3)]
    refuse(database, "training_jobs", jobs[1])
    assert database.one("SELECT release_held_jobs() AS n")["n"] == 2
    assert [database.job(job_id)["held"] for job_id in jobs] == [False, True, False]
