"""A claim that the wake-up itself has sent: whatever comes before its answer, the job is begun or goes back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import SecretStr

from daemon.attempt.collaborators import Collaborators
from daemon.database.connection import Database
from daemon.host.inspect import Host
from daemon.queue.row_visibility import RowVisibility
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.worker_registry import WorkerRegistry
from daemon.read_settings import load_settings
from daemon.report.courier import CallbackCourier
from daemon.storage.open import open_storage
from daemon.storage.upload_log import SqlUploadLog
from daemon.troubles import Troubles
from daemon.worker import Queue as WorkerQueue
from daemon.worker import Worker
from tests.daemon_process import eventually
from tests.lifecycle.queue import Queue
from tests.paths import SCRIPTED_TRAINER

LONG = [["steps", 2000, 0.02]]


@asynccontextmanager
async def resting(
    queue: Queue, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Worker, Database]]:
    """A worker that has nothing to do, without a listener: this test wakes it. It is drained at the end."""
    monkeypatch.setenv("TRAINER_DEVICE", "cpu")
    settings = load_settings(
        database_url=SecretStr(queue.dsn),
        work_dir=folder / "jobs",
        models_dir=folder / "models",
        storage="folder",
        storage_dir=folder / "storage",
        poll_seconds=600,
        kill_seconds=1,
    )
    host = Host(device="cpu")
    async with (
        Database(queue.dsn, application_name="work") as database,
        Database(queue.dsn, application_name="beat") as beat,
    ):
        storage = open_storage(settings)
        command = (sys.executable, str(SCRIPTED_TRAINER))
        store = SqlJobStore(database)
        worker = Worker(
            Collaborators.of(
                settings,
                host,
                command,
                Troubles(),
                store=store,
                heartbeat=SqlJobStore(beat),
                uploads=SqlUploadLog(database),
                storage=storage,
                courier=CallbackCourier(settings),
            ),
            WorkerQueue(store, RowVisibility(database), WorkerRegistry(database)),
        )
        running = asyncio.create_task(worker.run())
        try:
            async with asyncio.timeout(60):
                while not worker._at_rest:
                    await asyncio.sleep(0.01)
                yield worker, database
                worker.drain()
                await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await storage.close()


def claimed_ahead(queue: Queue, worker: Worker) -> UUID:
    """Wake the worker for a job, and wait without letting it hear: the claim is made, its answer is on its way."""
    job = queue.insert(script=LONG)
    worker.wake()
    assert worker._ahead is not None
    eventually(lambda: queue.row(job)["status"] == "initializing")
    return job


async def test_a_claim_that_nobody_heard_goes_back_before_the_daemon_leaves(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with resting(queue, tmp_path, monkeypatch) as (worker, database):
        job = claimed_ahead(queue, worker)
        worker.drain()
        # As another caller does, whose own statement got no answer in time.
        await database.close()
    row = queue.row(job)
    assert (row["status"], row["attempt"], queue.leases()) == ("queued", 0, [])


@pytest.mark.parametrize("told", [Worker.shut_down, Worker.drain])
async def test_a_daemon_told_to_leave_while_it_claims_keeps_its_promise(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[Worker], None]
) -> None:
    async with resting(queue, tmp_path, monkeypatch) as (worker, _database):
        job = claimed_ahead(queue, worker)
        told(worker)
        if told is Worker.drain:
            while not worker._running():
                await asyncio.sleep(0.01)
            assert queue.row(job)["status"] == "initializing"
            worker.shut_down()
    row = queue.row(job)
    assert (row["status"], row["attempt"], queue.leases()) == ("queued", 0, [])


async def test_a_paused_worker_has_begun_what_it_had_claimed(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with resting(queue, tmp_path, monkeypatch) as (worker, _database):
        job = claimed_ahead(queue, worker)
        await worker.pause()
        assert worker._running() == {str(job)} and worker.idle_seconds is None
        worker.shut_down()
    assert queue.row(job)["status"] == "queued"
