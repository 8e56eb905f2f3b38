"""What the views say: why a job waits, which lease has expired, which rows nobody holds."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.worker_registry import WorkerRegistry, WorkerRow
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed


def reason(database: AppDatabase, job_id: UUID) -> str:
    said: str = database.one("SELECT waiting_reason FROM training_queue WHERE job_id = %s", (job_id,))["waiting_reason"]
    return said


def gpu_host(**changes: Any) -> WorkerRow:
    given: dict[str, Any] = {
        "id": uuid4(), "host": "h", "device": "cuda", "gpu_count": 1, "gpu_memory_gb": 79.6, "gpu_type": "NVIDIA H100"
    }  # fmt: skip
    return WorkerRow(**(given | changes))


@pytest.mark.parametrize(
    ("host", "columns", "said"),
    [
        (None, {}, "no worker"),
        (gpu_host(), {}, "next"),
        (gpu_host(), {"gpu_config": {"count": 2}}, "no worker has 2 GPUs"),
        (gpu_host(gpu_memory_gb=24.0), {}, "GPU too small: 80.00 GB asked for"),
        (gpu_host(gpu_type="NVIDIA L4"), {}, "no worker has a GPU of the type H100"),
        (gpu_host(models=["a/b"]), {}, "no worker serves mistralai/Mistral-7B-v0.1"),
        (WorkerRow(uuid4(), "h", "cpu"), {"gpu_config": {"count": 2}}, "next"),
    ],
)
async def test_a_job_that_nobody_can_serve_says_so(
    store: SqlJobStore, database: AppDatabase, user: UUID, host: WorkerRow | None, columns: dict[str, Any], said: str
) -> None:
    if host is not None:
        await WorkerRegistry(store.database).register_worker(host)
    assert reason(database, database.insert_job(user, **columns)) == said


async def test_waiting_for_time_for_a_cap_and_for_a_free_host(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    registry = WorkerRegistry(store.database)
    host = gpu_host(user_cap=1)
    await registry.register_worker(host)
    now = database.one("SELECT now() AS at")["at"]
    scheduled = database.insert_job(user, run_after=now + timedelta(hours=1))
    assert reason(database, scheduled) == "scheduled"
    database.insert_job(user)
    await claimed(store)
    assert reason(database, database.insert_job(user)) == "cap reached"
    await registry.touch_worker(host.id, state="busy", busy=1, data={})
    other = database.insert_job(database.insert_user())
    assert reason(database, other) == "all workers busy"
    await registry.touch_worker(host.id, state="draining", busy=1, data={})
    assert reason(database, other) == "no worker"
    await registry.end_worker(host.id)
    row = database.one("SELECT * FROM training_worker_status")
    assert row["state"] == "gone"


async def test_a_silent_host_is_lost(store: SqlJobStore, database: AppDatabase) -> None:
    registry = WorkerRegistry(store.database)
    host = gpu_host()
    await registry.register_worker(host)
    database.run("UPDATE training_workers SET last_seen_at = now() - interval '10 minutes'")
    assert database.one("SELECT state FROM training_worker_status")["state"] == "lost"
    assert database.run("SELECT FROM training_live_workers") == []
    assert await registry.touch_worker(host.id, state="idle", busy=0, data={"gpu": [{"utilization": 3}]})
    assert len(database.run("SELECT FROM training_live_workers")) == 1
    assert not await registry.touch_worker(uuid4(), state="idle", busy=0, data={})


async def test_an_expired_lease_shows_as_lost_before_anyone_reaps(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    await claimed(store)
    with database.acting("authenticated", user) as owner:
        state = "SELECT state FROM training_job_status WHERE job_id = %s"
        row = owner.execute(state.encode(), (job_id,)).fetchone()
        assert row is not None and row["state"] == "initializing"
    database.run("UPDATE training_leases SET expires_at = clock_timestamp()")
    with database.acting("authenticated", user) as owner:
        row = owner.execute(state.encode(), (job_id,)).fetchone()
        assert row is not None and row["state"] == "lost"


def test_rows_that_say_running_without_a_lease_are_listed_and_left_alone(database: AppDatabase, user: UUID) -> None:
    job_id = database.insert_job(user)
    with database.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute("UPDATE training_jobs SET status = 'running', due = false")
    orphan = database.one("SELECT * FROM training_orphans")
    assert orphan["job_id"] == job_id and orphan["reason"].startswith("not ours")
    assert database.run("SELECT * FROM reap_expired_leases()") == []
    assert database.job(job_id)["status"] == "running"
