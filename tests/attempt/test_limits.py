"""What a job may cost and how long it may take: the row is the truth, also while the job runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from daemon.attempt.limits import enforce_limits
from daemon.database.connection import Database
from daemon.gateway.schemas import Submission
from daemon.host.inspect import Host
from daemon.queue.job import ClaimedJob
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from daemon.report.cost import CostMeter
from daemon.report.reporter import Reporter
from daemon.serverless.memory_job_store import MemoryJobStore
from daemon.serverless.memory_outbox import MemoryOutbox
from daemon.stop_request import Stop, StopReason
from tests.postgres import AppDatabase

DOLLAR_A_SECOND = 3600.0
FAR = "clock_timestamp() + interval '1 hour'"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same watch at another pace: a look every few seconds would make each of these tests take several."""
    monkeypatch.setattr("daemon.attempt.limits.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("daemon.attempt.limits.READ_SECONDS", 0.1)


async def claimed(store: SqlJobStore, database: AppDatabase, column: str, value: str) -> ClaimedJob:
    """A job that is past its limit within a tenth of a second."""
    user_id = database.insert_user()
    job_id = database.insert_job(user_id, database.insert_dataset(user_id))
    database.run(f"UPDATE training_jobs SET {column} = {value} WHERE id = %s", (job_id,))
    job = (await store.claim_job(uuid4(), Limits(), lease_seconds=60)).job
    assert job is not None
    return job


@asynccontextmanager
async def watched(job: ClaimedJob, store: SqlJobStore) -> AsyncIterator[Stop]:
    stop = Stop()
    meter = CostMeter(price=DOLLAR_A_SECOND, num_gpus=1, already_spent=0.0)
    reporter = Reporter(store, job.lease, meter=meter, on_refused=lambda: None)
    watching = asyncio.create_task(enforce_limits(job, reporter, store, stop))
    try:
        yield stop
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize(
    ("column", "tight", "wide", "reason"),
    [
        ("max_cost", "0.1", "1000", StopReason.BUDGET),
        ("max_cost", "0.1", "NULL", StopReason.BUDGET),
        ("deadline_at", "clock_timestamp() + interval '100 ms'", FAR, StopReason.DEADLINE),
        ("deadline_at", "clock_timestamp()", "NULL", StopReason.DEADLINE),
    ],
)
async def test_a_limit_that_is_changed_while_the_job_runs_counts(
    database: AppDatabase, column: str, tight: str, wide: str, reason: StopReason
) -> None:
    async with Database(database.dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        job = await claimed(store, database, column, tight)
        database.run(f"UPDATE training_jobs SET {column} = {wide}")
        async with watched(job, store) as stop:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    await stop.wait()
            database.run(f"UPDATE training_jobs SET {column} = {tight}")
            async with asyncio.timeout(30):
                assert await stop.wait() is reason


async def test_a_job_whose_row_is_deleted_is_stopped_as_one_whose_lease_is_lost(database: AppDatabase) -> None:
    async with Database(database.dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        job = await claimed(store, database, "max_cost", "NULL")
        async with watched(job, store) as stop, asyncio.timeout(30):
            database.run("DELETE FROM training_jobs")
            assert await stop.wait() is StopReason.LEASE_LOST


async def test_while_the_database_is_away_the_limit_that_is_known_holds(database: AppDatabase) -> None:
    async with Database(database.dsn, application_name="test") as connection:
        job = await claimed(SqlJobStore(connection), database, "max_cost", "0.1")
    async with (
        Database("postgresql://nobody@127.0.0.1:1/nowhere", application_name="test") as nobody,
        watched(job, SqlJobStore(nobody)) as stop,
        asyncio.timeout(30),
    ):
        assert await stop.wait() is StopReason.BUDGET


async def test_while_the_database_refuses_the_limit_that_is_known_holds(database: AppDatabase) -> None:
    async with Database(database.dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        job = await claimed(store, database, "max_cost", "0.5")
        database.run("REVOKE SELECT ON training_jobs FROM training_daemon")
        async with watched(job, store) as stop, asyncio.timeout(30):
            assert await stop.wait() is StopReason.BUDGET


async def test_a_request_without_a_row_has_no_limits_and_is_not_taken_for_a_deleted_one() -> None:
    store = MemoryJobStore(Host(device="cpu"), (), MemoryOutbox())
    submission = Submission(
        dataset_url="https://files.example.com/d.jsonl", hyperparameters={"base_model": "a/b"}, gpu_config={}
    )
    job = await store.claim(await store.submit(submission))
    assert job is not None and await store.read_limits(job.id) == (None, None)
