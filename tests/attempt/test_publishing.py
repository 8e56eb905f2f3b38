"""A finished adapter waits for a storage that is away, for as long as the setting says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from daemon.attempt.collaborators import Collaborators
from daemon.attempt.finished_adapter import keep_finished
from daemon.attempt.publishing import Publishing
from daemon.attempt.work_folder import WorkFolder
from daemon.database.connection import Database
from daemon.errors import HostFault, JobDelayed, JobError, JobFailed
from daemon.queue.sql_job_store import SqlJobStore
from daemon.report.cost import CostMeter
from daemon.report.reporter import Reporter
from daemon.storage.folder import FolderStorage
from daemon.storage.interface import StoredObject
from daemon.storage.upload_log import SqlUploadLog
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed
from training.events import ErrorCode


class AwayStorage(FolderStorage):
    """Raises these errors first, one at each upload."""

    def __init__(self, root: Path, errors: list[JobError]) -> None:
        super().__init__(root)
        self.errors = errors

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        if self.errors:
            raise self.errors.pop(0)
        return await super().upload(local, object_path, sha256=sha256, resume_dir=resume_dir)


class Site:
    def __init__(self, store: SqlJobStore, uploads: SqlUploadLog, folder: Path) -> None:
        self.store, self.uploads, self.folder = store, uploads, folder

    async def publish(self, errors: list[JobError], hours: float) -> tuple[str, list[str]]:
        """Returns where the adapter lies, and the kinds of the story."""
        job = await claimed(self.store)
        meter = CostMeter(price=None, num_gpus=1, already_spent=0.0)
        reporter = Reporter(self.store, job.lease, meter=meter, on_refused=lambda: None)
        workspace = WorkFolder.open(self.folder / "jobs", job.lease)
        workspace.adapter_dir.mkdir()
        (workspace.adapter_dir / "adapter_config.json").write_text(json.dumps({"r": 8}))
        (workspace.adapter_dir / "adapter_model.safetensors").write_bytes(b"weights")
        around = SimpleNamespace(
            uploads=self.uploads,
            storage=AwayStorage(self.folder / "storage", errors),
            settings=SimpleNamespace(upload_hours=hours),
        )
        publishing = Publishing(cast(Collaborators, around), job)
        adapter = keep_finished(workspace, workspace.adapter_dir, {"spec_sha256": "0" * 64})
        try:
            stored = await publishing.publish(adapter, workspace, reporter)
        finally:
            assert publishing.begun
            await reporter.flush()
        rows = await self.store.database.fetch("SELECT kind FROM training_events ORDER BY id")
        return stored.adapter_path, [row["kind"] for row in rows]


@pytest.fixture
async def site(database: AppDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr("daemon.attempt.publishing.FIRST_WAIT_SECONDS", 0.001)
    database.insert_job(database.insert_user())
    async with Database(database.dsn, application_name="test") as connection:
        yield Site(SqlJobStore(connection), SqlUploadLog(connection), tmp_path)


def away(count: int) -> list[JobError]:
    return [JobDelayed(ErrorCode.UPLOAD_FAILED, "the storage answered 503") for _ in range(count)]


async def test_a_storage_that_comes_back_gets_the_adapter_and_the_wait_is_told_once(site: Site) -> None:
    path, story = await site.publish(away(6), hours=1.0)
    UUID(path.removeprefix("lora-models/adapters/").removesuffix(".tar.gz"))
    assert story.count("upload_delayed") == 1


@pytest.mark.parametrize(
    ("error", "hours"),
    [
        (JobDelayed(ErrorCode.UPLOAD_FAILED, "the storage answered 503"), 0.0),
        (JobFailed(ErrorCode.UPLOAD_FAILED, "too large for the bucket"), 1.0),
        (HostFault("storage folder", ErrorCode.DISK_FULL, "full", detail="full"), 1.0),
    ],
    ids=["after its hours", "a refusal", "the host's fault"],
)
async def test_nothing_else_is_waited_for(site: Site, error: JobError, hours: float) -> None:
    errors: list[Any] = [error, *away(1)]
    with pytest.raises(type(error)):
        await site.publish(errors, hours)
    assert len(errors) == 1
