"""No object in Storage is unaccounted for: what no row names is deleted, whoever died when. Real rows, real files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from daemon.attempt.cleanup import Cleanup, FinishedAttempt
from daemon.attempt.work_folder import WorkFolder
from daemon.database.connection import Database
from daemon.errors import JobDelayed, LeaseLost
from daemon.queue.job import ClaimedJob
from daemon.queue.outcome import Completed, Failed
from daemon.queue.row_visibility import RowVisibility
from daemon.queue.sql_job_store import SqlJobStore
from daemon.settings import Settings
from daemon.storage.folder import FolderStorage
from daemon.storage.publish import object_names
from daemon.storage.sweep import sweep_forever, sweep_job
from daemon.storage.upload_log import SqlUploadLog, note_adapter
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed
from training.events import ErrorCode

BUCKET = "lora-models"
BROKEN = Failed(ErrorCode.INTERNAL, "broke", transient=True)


@dataclass
class Place:
    """A database with one job, and a storage that is a folder."""

    app: AppDatabase
    connection: Database
    storage: FolderStorage
    root: Path
    job_id: UUID

    def __post_init__(self) -> None:
        self.store = SqlJobStore(self.connection)
        self.uploads = SqlUploadLog(self.connection)
        self.visibility = RowVisibility(self.connection)

    async def uploaded(self) -> ClaimedJob:
        """The job is claimed and everything of its adapter is stored; then its host says nothing more."""
        job = await claimed(self.store)
        await note_adapter(self.uploads, job, self.storage.location)
        for name in object_names(job.id, job.lease_epoch).all():
            self.put(name)
        return job

    async def kept_checkpoint(self, job: ClaimedJob, step: int) -> None:
        names = [f"checkpoints/{job.id}/e{job.lease_epoch}-step{step}/{name}" for name in ("weights", "manifest.json")]
        await self.uploads.record_upload(job.lease, "checkpoint", self.storage.location, names, step=step)
        for name in names:
            self.put(name)
        await self.uploads.finish_checkpoint_upload(job.lease, step, manifest_sha256="0" * 64, size=1)

    async def completed(self, job: ClaimedJob) -> None:
        path = f"{BUCKET}/{object_names(job.id, job.lease_epoch).archive}"
        await self.store.complete_job(job.lease, Completed(path, "0" * 64, 1), cost=None)

    def put(self, name: str) -> None:
        file = self.root / BUCKET / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("content")

    def objects(self) -> set[str]:
        bucket = self.root / BUCKET
        return {file.relative_to(bucket).as_posix() for file in bucket.rglob("*") if file.is_file()}

    def notes(self) -> int:
        return int(self.app.one("SELECT count(*) AS n FROM training_uploads")["n"])

    async def sweep(self, keep_days: float = 7.0) -> None:
        await sweep_job(self.uploads, self.storage, self.job_id, keep_days)


@pytest.fixture
async def place(database: AppDatabase, tmp_path: Path) -> AsyncIterator[Place]:
    job_id = database.insert_job(database.insert_user(), max_attempts=5)
    async with Database(database.dsn, application_name="test") as connection:
        yield Place(database, connection, FolderStorage(tmp_path), tmp_path, job_id)


async def test_what_a_failed_attempt_stored_is_kept_while_its_job_waits_and_goes_with_it(place: Place) -> None:
    job = await place.uploaded()
    await place.store.retry_job(job.lease, BROKEN, delay_seconds=60, cost=None)
    await place.sweep()
    # The next attempt may adopt the adapter, on a host that does not see this one's volume.
    assert place.objects() == set(object_names(job.id, job.lease_epoch).all()) and place.notes() == 1
    (stored,) = await place.uploads.stored_adapters(job.id, place.storage.location)
    assert (stored.epoch, stored.objects[0]) == (1, object_names(job.id, 1).archive)
    place.app.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job.id,))
    await place.sweep()
    assert place.objects() == set() and place.notes() == 0


async def test_the_winners_objects_stay_and_those_of_earlier_attempts_go(place: Place) -> None:
    first = await place.uploaded()
    await place.store.release_job(first.lease, "its host goes", cost=None)
    second = await place.uploaded()
    await place.kept_checkpoint(second, 10)
    await place.completed(second)
    await place.sweep()
    assert place.objects() == set(object_names(second.id, second.lease_epoch).all())
    assert place.notes() == 0


async def test_nothing_of_a_job_that_somebody_holds_is_touched(place: Place) -> None:
    first = await place.uploaded()
    await place.store.release_job(first.lease, "its host goes", cost=None)
    await place.uploaded()
    before = place.objects()
    await place.sweep(keep_days=0.0)
    assert place.objects() == before and place.notes() == 2


async def test_a_failed_jobs_checkpoint_is_kept_for_its_time_and_its_adapter_is_not(place: Place) -> None:
    job = await place.uploaded()
    await place.kept_checkpoint(job, 10)
    await place.store.fail_job(job.lease, BROKEN, cost=None)
    await place.sweep()
    assert {name.partition("/")[0] for name in place.objects()} == {"checkpoints"}
    await place.sweep(keep_days=0.0)
    assert place.objects() == set() and place.notes() == 0


async def test_the_objects_of_a_deleted_job_are_found(place: Place) -> None:
    job = await place.uploaded()
    await place.kept_checkpoint(job, 10)
    place.app.run("DELETE FROM training_jobs WHERE id = %s", (job.id,))
    await place.sweep()
    assert place.objects() == set() and place.notes() == 0


HIDE = "CREATE POLICY tenants ON {} AS RESTRICTIVE USING (false)"


@pytest.mark.parametrize("table", ["training_jobs", "training_leases"])
async def test_nothing_is_deleted_of_a_job_that_is_only_hidden(place: Place, tmp_path: Path, table: str) -> None:
    job = await place.uploaded()
    await place.kept_checkpoint(job, 10)
    settings = Settings(_env_file=None, database_url=SecretStr(place.app.dsn), work_dir=tmp_path / "jobs")
    workspace = WorkFolder.open(settings.work_dir, job.lease)
    (workspace.checkpoint_dir / "step").write_text("10")
    before = place.objects()
    place.app.run(HIDE.format(table))
    await place.sweep(keep_days=0.0)
    tidying = Cleanup(place.store, place.uploads, place.storage, settings)
    tidying.begin(FinishedAttempt(job, ending=None, stored=False))
    await tidying.finish()
    assert place.objects() == before and place.notes() == 2
    assert (workspace.checkpoint_dir / "step").exists()


async def test_orphans_of_a_table_that_was_made_anew_count_only_when_they_are_asked_for(place: Place) -> None:
    job = await place.uploaded()
    place.app.run("TRUNCATE training_jobs CASCADE")
    asked: dict[str, Any] = {"job_id": None, "idle_seconds": 0.0, "keep_seconds": 0.0, "limit": 10}
    location = place.storage.location
    assert await place.uploads.leftovers(location, orphans=False, **asked) == []
    assert [each.job_id for each in await place.uploads.leftovers(location, orphans=True, **asked)] == [job.id]
    found = await place.store.find_job(job.id)
    assert found.is_deleted and found.tables != job.tables


async def test_a_folder_whose_job_went_with_the_whole_table_is_kept(place: Place, tmp_path: Path) -> None:
    job = await place.uploaded()
    settings = Settings(_env_file=None, database_url=SecretStr(place.app.dsn), work_dir=tmp_path / "jobs")
    workspace = WorkFolder.open(settings.work_dir, job.lease)
    (workspace.checkpoint_dir / "step").write_text("10")
    place.app.run("TRUNCATE training_jobs CASCADE")
    tidying = Cleanup(place.store, place.uploads, place.storage, settings)
    tidying.begin(FinishedAttempt(job, ending=None, stored=False))
    await tidying.finish()
    assert (workspace.checkpoint_dir / "step").exists(), "its row may come from a backup yet"


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "taken_over"])
async def test_an_attempt_that_has_lost_its_job_keeps_the_checkpoints_only_while_there_is_a_row(
    place: Place, tmp_path: Path, deleted: bool
) -> None:
    job = await place.uploaded()
    await place.kept_checkpoint(job, 10)
    settings = Settings(_env_file=None, database_url=SecretStr(place.app.dsn), work_dir=tmp_path / "jobs")
    workspace = WorkFolder.open(settings.work_dir, job.lease)
    (workspace.checkpoint_dir / "step").write_text("10")
    if deleted:
        place.app.run("DELETE FROM training_jobs")
    tidying = Cleanup(place.store, place.uploads, place.storage, settings)
    tidying.begin(FinishedAttempt(job, ending=None, stored=True))
    await tidying.finish()
    assert (workspace.checkpoint_dir / "step").exists() == workspace.job_dir.exists() == (not deleted)
    assert {name.partition("/")[0] for name in place.objects()} == (set() if deleted else {"checkpoints"})
    assert place.notes() == (0 if deleted else 2) and not workspace.attempt_dir.exists()


async def test_a_host_that_dies_after_the_completion_leaves_no_note_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await place.uploaded()
    await place.store.release_job(first.lease, "its host goes", cost=None)
    second = await place.uploaded()
    await place.completed(second)
    # The daemon dies here. Another daemon's hourly sweep comes by, an hour later and again.
    monkeypatch.setattr("daemon.storage.sweep.SWEEP_SECONDS", 0.01)
    sweeping = asyncio.create_task(sweep_forever(place.uploads, place.visibility, place.storage, 7.0))
    await asyncio.sleep(0.1)
    assert place.notes() == 2  # too fresh: a host that lost its lease may still be uploading
    place.app.run("UPDATE training_uploads SET noted_at = noted_at - interval '2 hours'")
    async with asyncio.timeout(30):
        while place.notes():
            await asyncio.sleep(0.01)
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    assert place.objects() == set(object_names(second.id, second.lease_epoch).all())


async def test_a_bucket_of_the_same_name_elsewhere_is_not_swept(place: Place, tmp_path: Path) -> None:
    job = await place.uploaded()
    await place.kept_checkpoint(job, 10)
    elsewhere = FolderStorage(tmp_path / "another disk", BUCKET)
    assert await place.uploads.stored_checkpoints(job.id, elsewhere.location) == []
    await place.store.fail_job(job.lease, BROKEN, cost=None)
    before = place.objects()
    await sweep_job(place.uploads, elsewhere, job.id, keep_days=0.0)
    assert place.objects() == before and place.notes() == 2
    # Another host that mounts the same folder under another path knows it for what it is.
    mounted = tmp_path / "mounted"
    mounted.symlink_to(place.root)
    await sweep_job(place.uploads, FolderStorage(mounted, BUCKET), job.id, keep_days=0.0)
    assert place.objects() == set() and place.notes() == 0


async def test_what_cannot_be_deleted_now_stays_noted(place: Place) -> None:
    job = await place.uploaded()
    await place.store.fail_job(job.lease, BROKEN, cost=None)
    # Deleting a folder as if it were a file fails, as a storage that is away does.
    refused = place.root / BUCKET / object_names(job.id, job.lease_epoch).archive
    refused.unlink()
    refused.mkdir()
    with pytest.raises(JobDelayed):
        await place.storage.delete(object_names(job.id, job.lease_epoch).archive)
    await place.sweep()
    assert place.notes() == 1
    refused.rmdir()
    await place.sweep()
    assert place.notes() == 0 and place.objects() == set()


async def test_whoever_lost_the_lease_stores_nothing(place: Place) -> None:
    job = await claimed(place.store)
    await place.store.release_job(job.lease, "its host goes", cost=None)
    with pytest.raises(LeaseLost):
        await note_adapter(place.uploads, job, place.storage.location)
    assert place.notes() == 0
