"""The heartbeat: it goes on whatever the database answers, and stops the attempt when the lease is lost."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from daemon.database.connection import Database
from daemon.queue.lease import LeaseKeeper
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from daemon.stop_request import Stop, StopReason
from tests.postgres import AppDatabase

LEASE_SECONDS = 0.3


async def test_a_right_that_is_missing_for_a_while_ends_no_heartbeat(database: AppDatabase) -> None:
    user_id = database.insert_user()
    database.insert_job(user_id, database.insert_dataset(user_id))
    async with Database(database.dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        job = (await store.claim_job(uuid4(), Limits(), lease_seconds=60)).job
        assert job is not None
        stop = Stop()
        keeper = LeaseKeeper(store, lease_seconds=LEASE_SECONDS, on_partition="continue")
        async with keeper.hold(job.lease, stop), asyncio.timeout(30):
            database.run("REVOKE UPDATE ON training_leases FROM training_daemon")
            await asyncio.sleep(LEASE_SECONDS)
            database.run("GRANT UPDATE ON training_leases TO training_daemon")
            given_back_at = database.one("SELECT clock_timestamp() AS now")["now"]
            while database.one("SELECT heartbeat_at FROM training_leases")["heartbeat_at"] < given_back_at:
                await asyncio.sleep(0.02)
            assert stop.reason is None
            database.run("DELETE FROM training_leases")
            assert await stop.wait() is StopReason.LEASE_LOST
