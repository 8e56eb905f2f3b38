"""Checkpoints in Storage: the newest wins, a failure fails nothing, and only a whole one that is ours is fetched."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from daemon.attempt.stored_checkpoints import CheckpointStore, CheckpointUnusable, newest_whole_step, read_manifest
from daemon.attempt.work_folder import WorkFolder
from daemon.database.connection import Database
from daemon.errors import JobFailed
from daemon.queue.job import ClaimedJob
from daemon.queue.sql_job_store import SqlJobStore
from daemon.stop_request import Stop
from daemon.storage.folder import FolderStorage
from daemon.storage.interface import StoredObject
from daemon.storage.supabase import SupabaseStorage
from daemon.storage.upload_log import SqlUploadLog
from tests.doubles.storage import SERVICE_KEY, Bucket, StorageDouble
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed
from training.events import ErrorCode
from training.loop.checkpoint import CheckpointShelf

BUCKET = "lora-models"


class GatedStorage(FolderStorage):
    """A folder whose uploads wait at a gate, and fail where they are told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.refusal: JobFailed | None = None

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        self.begun.append(object_path)
        await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal
        return await super().upload(local, object_path, sha256=sha256, resume_dir=resume_dir)


class Host:
    """A host with a disk of its own, working on the one job that there is."""

    def __init__(self, folder: Path, store: SqlJobStore, storage: Any, job: ClaimedJob) -> None:
        self.workspace = WorkFolder.open(folder, job.lease)
        self.story: list[tuple[str, dict[str, Any]]] = []
        self.keeper = CheckpointStore(SqlUploadLog(store.database), storage, job, self.workspace, self.tell)

    def tell(self, kind: str, _message: str, data: dict[str, Any]) -> None:
        self.story.append((kind, data))

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [data for said, data in self.story if said == kind]

    def save(self, step: int) -> None:
        """As the trainer does: whole, hashed, two kept."""
        shelf = CheckpointShelf(self.workspace.checkpoint_dir, {"run": 1})
        written = shelf.prepare()
        (written / "adapter.safetensors").write_bytes(f"weights of {step}".encode())
        (written / "optimizer.pt").write_bytes(f"moments of {step}".encode())
        shelf.publish(written, step)
        self.keeper.offer(step)

    async def finish(self) -> None:
        await self.keeper.finish(30.0, Stop())

    def resumes_at(self) -> int | None:
        found, _damaged = CheckpointShelf(self.workspace.checkpoint_dir, {"run": 1}).newest()
        return None if found is None else found.step


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    database.insert_job(database.insert_user())
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


@pytest.fixture
def storage(tmp_path: Path) -> GatedStorage:
    return GatedStorage(tmp_path / "storage")


async def handed_on(store: SqlJobStore, job: ClaimedJob) -> ClaimedJob:
    await store.release_job(job.lease, "its host goes", cost=None)
    return await claimed(store)


def objects(tmp_path: Path) -> set[str]:
    root = tmp_path / "storage" / BUCKET
    return {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}


async def test_another_host_gets_the_newest_checkpoint_byte_for_byte(
    store: SqlJobStore, storage: GatedStorage, tmp_path: Path
) -> None:
    job = await claimed(store)
    one = Host(tmp_path / "one", store, storage, job)
    one.save(10)
    await one.finish()
    one.save(20)
    await one.finish()
    assert [data["step"] for data in one.told("checkpoint_stored")] == [10, 20]
    # One is kept, its manifest last.
    assert {name.split("/")[2] for name in objects(tmp_path)} == {"e1-step20"}
    assert storage.begun[-1].endswith("e1-step20/manifest.json")
    other = Host(tmp_path / "other", store, storage, await handed_on(store, job))
    await other.keeper.fetch()
    assert other.resumes_at() == 20 and other.told("checkpoint_fetched")[0]["step"] == 20
    theirs, ours = (host.workspace.checkpoint_dir / "checkpoint-20" for host in (one, other))
    assert {f.name: f.read_bytes() for f in theirs.iterdir()} == {f.name: f.read_bytes() for f in ours.iterdir()}


async def test_while_one_is_uploaded_only_the_newest_of_those_that_follow_is_kept(
    store: SqlJobStore, storage: GatedStorage, tmp_path: Path
) -> None:
    host = Host(tmp_path / "one", store, storage, await claimed(store))
    storage.gate.clear()
    host.save(1)
    async with asyncio.timeout(30):
        while not storage.begun:
            await asyncio.sleep(0.01)
    for step in (2, 3, 4, 5):
        host.save(step)  # pushes the one under way out of the folder
    await asyncio.sleep(0.05)
    assert len(storage.begun) == 1  # one upload at a time
    storage.gate.set()
    await host.finish()
    assert [data["step"] for data in host.told("checkpoint_stored")] == [1, 5]
    assert host.told("checkpoint_not_stored") == []


async def test_a_refusal_is_told_once_and_fails_nothing(
    store: SqlJobStore, storage: GatedStorage, tmp_path: Path
) -> None:
    host = Host(tmp_path / "one", store, storage, await claimed(store))
    storage.refusal = JobFailed(ErrorCode.UPLOAD_FAILED, "too large for the bucket")
    for step in (1, 2, 3):
        host.save(step)
        await host.finish()
    (told,) = host.told("checkpoint_not_stored")
    assert told["given_up"] and "too large" in told["reason"]
    assert len(storage.begun) == 1


async def test_an_upload_that_is_cut_short_is_no_checkpoint(
    store: SqlJobStore, storage: GatedStorage, tmp_path: Path
) -> None:
    job = await claimed(store)
    host = Host(tmp_path / "one", store, storage, job)
    host.save(10)
    await host.finish()
    storage.begun.clear()
    storage.gate.clear()
    host.save(20)
    async with asyncio.timeout(30):
        while not storage.begun:
            await asyncio.sleep(0.01)
    await host.keeper.finish(0.0, Stop())
    other = Host(tmp_path / "other", store, storage, await handed_on(store, job))
    await other.keeper.fetch()
    assert other.resumes_at() == 10


async def test_a_host_with_a_newer_one_on_its_disk_fetches_nothing(
    store: SqlJobStore, storage: GatedStorage, tmp_path: Path
) -> None:
    job = await claimed(store)
    host = Host(tmp_path / "one", store, storage, job)
    host.save(10)
    await host.finish()
    again = Host(tmp_path / "one", store, storage, await handed_on(store, job))
    await again.keeper.fetch()
    assert again.story == [] and again.resumes_at() == 10
    # Damaged on the disk, whole in Storage: fetched.
    (again.workspace.checkpoint_dir / "checkpoint-10" / "optimizer.pt").write_bytes(b"damaged")
    await again.keeper.fetch()
    assert again.told("checkpoint_fetched") and again.resumes_at() == 10


@pytest.mark.parametrize("damage", ["a file", "the manifest", "gone", "a foreign manifest"])
async def test_a_damaged_or_foreign_checkpoint_is_ignored_with_a_notice(
    store: SqlJobStore, storage: GatedStorage, tmp_path: Path, damage: str
) -> None:
    job = await claimed(store)
    host = Host(tmp_path / "one", store, storage, job)
    host.save(10)
    await host.finish()
    folder = tmp_path / "storage" / BUCKET / "checkpoints" / str(job.id) / "e1-step10"
    match damage:
        case "a file":
            (folder / "optimizer.pt").write_bytes(b"moments of 11")
        case "the manifest":
            (folder / "manifest.json").write_bytes(b"{}")
        case "gone":
            (folder / "optimizer.pt").unlink()
        case _:
            # Consistent in itself, but not what our host stored.
            (folder / "optimizer.pt").write_bytes(b"poison")
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"]["optimizer.pt"] = hashlib.sha256(b"poison").hexdigest()
            (folder / "manifest.json").write_text(json.dumps(manifest))
    other = Host(tmp_path / "other", store, storage, await handed_on(store, job))
    await other.keeper.fetch()
    assert other.told("stored_checkpoint_ignored")[0]["step"] == 10
    assert list(other.workspace.checkpoint_dir.iterdir()) == []


async def test_a_storage_that_forgets_an_upload_and_refuses_large_files_delays_nobody(
    store: SqlJobStore, tmp_path: Path
) -> None:
    async with StorageDouble(tmp_path / "double") as double:
        double.buckets[BUCKET] = Bucket(file_size_limit=10)
        storage = SupabaseStorage(double.url, SERVICE_KEY, first_wait_seconds=0.01)
        host = Host(tmp_path / "one", store, storage, await claimed(store))
        host.save(1)
        await host.finish()
        assert host.told("checkpoint_not_stored")[0]["given_up"]
        await storage.close()


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "manifest.json", ".hidden", ""])
def test_a_manifest_with_a_name_that_leads_elsewhere_is_unusable(name: str) -> None:
    with pytest.raises(CheckpointUnusable):
        read_manifest(json.dumps({"step": 1, "files": {name: "0" * 64}}).encode())


def test_a_folder_without_a_checkpoint_has_no_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / ".staging").mkdir()
    assert newest_whole_step(tmp_path) == -1
