"""The sessions that sleep outlive a database that ends sleeping sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from daemon.cli.data.connection import connect
from daemon.cli.data.notifications import listen, wait_for_change
from daemon.database.listener import CHANNEL, Listener
from daemon.gateway.dashboard.broadcaster import Feed
from tests.postgres import AppDatabase

IDLE_SECONDS = 1
# Beyond this a session that Postgres was to end has outlived it.
OUTLIVED_SECONDS = IDLE_SECONDS + 1.5


@pytest.fixture
def impatient(database: AppDatabase) -> Iterator[AppDatabase]:
    """A database that ends a session after a second of sleep."""
    name = database.one("SELECT current_database() AS name")["name"]
    database.run(f"ALTER DATABASE {name} SET idle_session_timeout = '{IDLE_SECONDS}s'")
    yield database


async def idle_of(database: AppDatabase, application: str) -> dict[int, float]:
    """Seconds that each session of this name has slept, by its pid; for ever if nobody of that name sleeps."""
    rows = await asyncio.to_thread(
        database.run,
        "SELECT pid, extract(epoch FROM clock_timestamp() - state_change)::float AS seconds FROM pg_stat_activity "
        "WHERE application_name = %s AND state = 'idle' AND datname = current_database()",
        (application,),
    )
    return {row["pid"]: row["seconds"] for row in rows}


async def until_outlived(database: AppDatabase, application: str) -> None:
    async with asyncio.timeout(30):
        while not any(seconds > OUTLIVED_SECONDS for seconds in (await idle_of(database, application)).values()):
            await asyncio.sleep(0.1)


async def test_a_listener_sleeps_longer_than_the_database_lets_a_session(impatient: AppDatabase) -> None:
    with structlog.testing.capture_logs() as logs:
        woken = asyncio.Event()
        listener = Listener(impatient.dsn, wake=woken.set, on_cancel=lambda _job: None)
        task = asyncio.create_task(listener.run())
        try:
            async with asyncio.timeout(30):
                await listener.hears.wait()
            await until_outlived(impatient, "brightrun-trainer listener")
            woken.clear()
            impatient_session: Any = impatient
            await asyncio.to_thread(impatient_session.run, "SELECT pg_notify(%s, 'queued')", (CHANNEL,))
            async with asyncio.timeout(10):
                await woken.wait()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert [line["event"] for line in logs if line["event"] == "listener_lost"] == []


async def test_the_dashboards_listener_sleeps_as_long(impatient: AppDatabase) -> None:
    feed = Feed(impatient.dsn)
    client = feed.join("", lambda: True)
    task = asyncio.create_task(feed.run())
    try:
        await until_outlived(impatient, "brightrun-trainer listener")
    finally:
        feed.leave(client)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_command_that_watches_sleeps_as_long(impatient: AppDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", impatient.dsn)
    with connect() as connection:
        listen(connection)
        wait_for_change(connection, OUTLIVED_SECONDS)
        assert connection.execute("SELECT 1 AS one").fetchone() == {"one": 1}
