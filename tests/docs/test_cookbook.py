"""Every query of the cookbook is run as the role that it names, in a database where it has something to find."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import UUID

import psycopg
import psycopg.sql
import pytest

from daemon.database.connection import Database
from daemon.queue.sql_job_store import SqlJobStore
from tests.paths import ROOT
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed
from tests.sql.world import Jobs, held, orphan, populate

COOKBOOK = ROOT / "docs" / "cookbook.md"
ROLES = {"user": "authenticated", "server": "service_role"}
QUERIES = re.findall(r"```sql\n(.*?)```", COOKBOOK.read_text(), re.DOTALL)


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


@pytest.fixture
def user(database: AppDatabase) -> UUID:
    return database.insert_user()


async def furnish(store: SqlJobStore, database: AppDatabase, user: UUID) -> dict[str, Any]:
    """A user with jobs in every state and a host that died with one; returns the values of the variables."""
    jobs: Jobs = await populate(store, database, user)
    forsaken = database.insert_job(user)
    lease = (await claimed(store, lease_seconds=60.0)).lease
    assert lease.job_id == forsaken
    # Its host fell silent a moment ago, and the running one has not moved for an hour.
    database.run(
        "UPDATE training_leases SET heartbeat_at = now() - interval '2 ms', expires_at = now() - interval '1 ms' "
        "WHERE job_id = %s",
        (forsaken,),
    )
    with database.connect() as session, session.transaction():
        session.execute("SET LOCAL session_replication_role = replica")
        session.execute(
            "UPDATE training_jobs SET last_progress_at = now() - interval '1 hour' WHERE id = %s", (jobs.running,)
        )
    held(database, user)
    orphan(database, user)
    queued = database.insert_job(user)
    return {
        "running_id": jobs.running,
        "failed_id": jobs.failed,
        "dead_callback_id": jobs.dead_callback,
        "user_id": user,
        "job_id": jobs.completed,
        "queued_id": queued,
        "dataset_id": database.insert_dataset(user),
        "dataset_of_completed_id": database.job(jobs.completed)["dataset_id"],
        "last_event_id": 0,
    }


def as_psql(query: str, values: Mapping[str, Any]) -> str:
    """Put each :'variable' in its place, as psql does; a variable that nobody set is a KeyError."""
    return re.sub(r":'(\w+)'", lambda found: psycopg.sql.Literal(str(values[found[1]])).as_string(), query)


def who(query: str) -> str:
    head = re.match(r"-- as: (user|server|operator)\n", query)
    assert head is not None, f"the query does not say who runs it: {query}"
    return head[1]


def run_as(database: AppDatabase, role: str, user: UUID, statement: str) -> list[dict[str, Any]]:
    """In a transaction that is undone, so that one query does not change what another finds."""
    with database.connect() as connection:
        connection.autocommit = False
        if role != "operator":
            claims = f'{{"role": "{ROLES[role]}", "sub": "{user}"}}'
            connection.execute("SELECT set_config('request.jwt.claims', %s, true)", (claims,))
            connection.execute("SELECT set_config('role', %s, true)", (ROLES[role],))
        cursor = connection.execute(statement.encode())
        rows = cursor.fetchall() if cursor.description is not None else []
        connection.rollback()
        return rows


async def test_every_query_of_the_cookbook_finds_something_as_the_role_it_names(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    values = await furnish(store, database, user)
    assert len(QUERIES) > 30
    empty = []
    for query in QUERIES:
        role = who(query)
        rows = run_as(database, role, user, as_psql(query, values))
        if not rows and not query.startswith("-- as: operator\nALTER ROLE"):
            empty.append(query)
    assert empty == []


async def test_what_the_cookbook_promises_of_a_user_holds_for_him_alone(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    values = await furnish(store, database, user)
    stranger = database.insert_user()
    theirs = [query for query in QUERIES if who(query) == "user" and ":'" in query and "INSERT" not in query]
    assert theirs
    for query in theirs:
        try:
            rows = run_as(database, "user", stranger, as_psql(query, values))
        except psycopg.DatabaseError as error:
            assert error.sqlstate == "PT404", query
        else:
            assert rows == [], query
