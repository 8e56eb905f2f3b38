"""The reaper's patience: after any absence of the database every holder first gets one lease's time to renew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from uuid import UUID

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.queue.job import Lease
from daemon.queue.reaper import reap_forever
from daemon.queue.row_visibility import RowVisibility
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import State
from tests.doubles.tcp_proxy import TcpProxy
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed

LEASE_SECONDS = 1.2


@pytest.fixture
def proxy(database: AppDatabase) -> Iterator[TcpProxy]:
    with TcpProxy(int(psycopg.conninfo.conninfo_to_dict(database.dsn)["port"] or 5432)) as proxy:
        yield proxy


@asynccontextmanager
async def reaper_behind(proxy: TcpProxy, dsn: str) -> AsyncIterator[None]:
    async with Database(proxy.dsn(dsn), application_name="reaper") as database:
        reaping = asyncio.create_task(reap_forever(SqlJobStore(database), RowVisibility(database), LEASE_SECONDS))
        try:
            yield
        finally:
            reaping.cancel()
            await asyncio.gather(reaping, return_exceptions=True)


async def silent_job(store: SqlJobStore, database: AppDatabase) -> Lease:
    """A job whose holder has missed its time, and the next one."""
    lease = (await claimed(store, lease_seconds=LEASE_SECONDS)).lease
    database.run(
        "UPDATE training_leases SET heartbeat_at = heartbeat_at - interval '10 s', "
        "expires_at = expires_at - interval '10 s' WHERE job_id = %s",
        (lease.job_id,),
    )
    return lease


async def reaped(database: AppDatabase, lease: Lease) -> None:
    async with asyncio.timeout(30):
        while database.job(lease.job_id)["error_code"] != "worker_lost":
            await asyncio.sleep(0.02)


async def an_answer_comes_late(proxy: TcpProxy) -> None:
    """Longer than the reaper's own rhythm: one of its statements is among what was held back."""
    proxy.hold_back()
    await asyncio.sleep(LEASE_SECONDS / 2 + 1.4)
    proxy.let_go()


async def a_connection_breaks(proxy: TcpProxy) -> None:
    proxy.cut()


@pytest.mark.parametrize("absence", [an_answer_comes_late, a_connection_breaks])
async def test_after_an_absence_of_the_database_holders_may_renew_before_anyone_is_reaped(
    store: SqlJobStore,
    database: AppDatabase,
    user: UUID,
    proxy: TcpProxy,
    absence: Callable[[TcpProxy], Coroutine[None, None, None]],
) -> None:
    for _ in range(2):
        database.insert_job(user, max_attempts=1)
    async with reaper_behind(proxy, database.dsn):
        # It does reap: the first is gone as soon as the reaper has known its database for a lease.
        await reaped(database, await silent_job(store, database))
        late = asyncio.create_task(absence(proxy))
        await asyncio.sleep(0.1)
        lease = await silent_job(store, database)
        await late
        # The holder was kept waiting as well: its heartbeat comes a moment after the database.
        await asyncio.sleep(LEASE_SECONDS / 3)
        assert await store.renew_lease(lease, LEASE_SECONDS) is State.INITIALIZING
        # And then it is silent for good.
        await reaped(database, lease)
