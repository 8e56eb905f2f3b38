"""What an ending costs, what it waits for, and what is tidied after it. Real rows, a folder for a storage."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from daemon.attempt.cleanup import Cleanup, FinishedAttempt
from daemon.attempt.settle import settle
from daemon.attempt.work_folder import WorkFolder
from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.queue.job import Lease
from daemon.queue.outcome import Cancelled, Completed, Failed, Released, Superseded
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import State
from daemon.report.cost import CostMeter
from daemon.report.reporter import Reporter
from daemon.settings import Settings
from daemon.stop_request import Stop, StopReason
from daemon.storage.folder import FolderStorage
from daemon.storage.publish import object_names
from daemon.storage.upload_log import SqlUploadLog, note_adapter
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed
from training import events
from training.events import ErrorCode, Stage

REFUSED = Failed(ErrorCode.INVALID_SPEC, "no such field")


class CountingDatabase(Database):
    """Remembers which statements it ran."""

    ran: list[str]

    async def fetch(self, text: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        self.ran.append(text)
        return await super().fetch(text, parameters)


class SlowStorage(FolderStorage):
    """A folder whose deletions wait at a gate."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()

    async def delete(self, object_path: str) -> None:
        self.asked.set()
        await self.gate.wait()
        await super().delete(object_path)


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    database.insert_job(database.insert_user())
    async with CountingDatabase(database.dsn, application_name="test", statement_seconds=1.0) as connection:
        connection.ran = []
        yield SqlJobStore(connection)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, database_url="postgresql://x", work_dir=tmp_path / "jobs")


def reporter_of(store: SqlJobStore, lease: Any) -> Reporter:
    meter = CostMeter(price=None, num_gpus=1, already_spent=0.0)
    return Reporter(store, lease, meter=meter, on_refused=lambda: None)


def put(root: Path, name: str) -> Path:
    file = root / "lora-models" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("content")
    return file


async def test_a_job_refused_at_the_first_look_is_written_back_by_one_statement(
    store: SqlJobStore, settings: Settings, tmp_path: Path
) -> None:
    job = await claimed(store)
    counting = store.database
    assert isinstance(counting, CountingDatabase)
    counting.ran.clear()
    ending = await settle(job, REFUSED, reporter_of(store, job.lease), stop=Stop(), store=store, settings=settings)
    assert ending is not None and (ending.state, ending.noted) == (State.FAILED, False)
    tidying = Cleanup(store, SqlUploadLog(store.database), FolderStorage(tmp_path), settings)
    tidying.begin(FinishedAttempt(job, ending, stored=False))
    await tidying.finish()
    assert counting.ran == [statement("fail_job")]


async def test_an_ending_says_whether_something_of_the_job_lies_in_storage(
    store: SqlJobStore, database: AppDatabase, settings: Settings, tmp_path: Path
) -> None:
    uploads = SqlUploadLog(store.database)
    storage = FolderStorage(tmp_path)
    first = await claimed(store)
    await note_adapter(uploads, first, storage.location)
    left = put(tmp_path, object_names(first.id, first.lease_epoch).archive)
    await store.release_job(first.lease, "its host dies", cost=None)
    second = await claimed(store)
    ending = await settle(
        second, REFUSED, reporter_of(store, second.lease), stop=Stop(), store=store, settings=settings
    )
    assert ending is not None and ending.noted
    tidying = Cleanup(store, uploads, storage, settings)
    tidying.begin(FinishedAttempt(second, ending, stored=False))
    await tidying.finish()
    assert not left.exists() and database.run("SELECT FROM training_uploads") == []


async def test_what_an_attempt_stored_after_it_lost_its_job_is_deleted_by_itself(
    store: SqlJobStore, database: AppDatabase, settings: Settings, tmp_path: Path
) -> None:
    uploads = SqlUploadLog(store.database)
    storage = FolderStorage(tmp_path)
    stale = await claimed(store)
    await note_adapter(uploads, stale, storage.location)
    workspace = WorkFolder.open(settings.work_dir, stale.lease)
    await store.release_job(stale.lease, "it fell silent, and was reaped", cost=None)
    heir = await claimed(store)
    await note_adapter(uploads, heir, storage.location)
    kept = put(tmp_path, object_names(heir.id, heir.lease_epoch).archive)
    done = Completed(f"lora-models/{object_names(heir.id, heir.lease_epoch).archive}", "0" * 64, 1)
    tidying = Cleanup(store, uploads, storage, settings)
    ending = await settle(heir, done, reporter_of(store, heir.lease), stop=Stop(), store=store, settings=settings)
    tidying.begin(FinishedAttempt(heir, ending, stored=True))
    await tidying.finish()
    assert database.run("SELECT FROM training_uploads") == [], "the note of the stale attempt is gone"
    # Only now the stale host's last bytes arrive, and then it learns that the job is not its own.
    late = put(tmp_path, object_names(stale.id, stale.lease_epoch).archive)
    ending = await settle(
        stale, Superseded(), reporter_of(store, stale.lease), stop=Stop(), store=store, settings=settings
    )
    assert ending is None
    tidying.begin(FinishedAttempt(stale, ending, stored=True))
    await tidying.finish()
    assert not late.exists() and kept.exists() and not workspace.attempt_dir.exists()


async def test_tidying_keeps_a_stopping_host_only_for_a_moment_and_is_done_by_another(
    store: SqlJobStore, database: AppDatabase, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = SqlUploadLog(store.database)
    monkeypatch.setattr("daemon.attempt.cleanup.FINISH_SECONDS", 0.05)
    storage = SlowStorage(tmp_path)
    job = await claimed(store)
    await note_adapter(uploads, job, storage.location)
    left = put(tmp_path, object_names(job.id, job.lease_epoch).archive)
    ending = await settle(job, REFUSED, reporter_of(store, job.lease), stop=Stop(), store=store, settings=settings)
    stopping = Cleanup(store, uploads, storage, settings)
    stopping.begin(FinishedAttempt(job, ending, stored=True))
    async with asyncio.timeout(30):
        await storage.asked.wait()
        await stopping.finish()
    assert left.exists() and len(database.run("SELECT FROM training_uploads")) == 1
    storage.gate.set()
    monkeypatch.setattr("daemon.attempt.cleanup.FINISH_SECONDS", 30.0)
    other = Cleanup(store, uploads, storage, settings)
    other.begin(FinishedAttempt(job, ending, stored=True))
    await other.finish()
    assert not left.exists() and database.run("SELECT FROM training_uploads") == []


async def test_a_locked_table_of_the_charts_keeps_no_ending_waiting(
    store: SqlJobStore, database: AppDatabase, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.attempt.settle.AWAY_SECONDS", 0.01)
    job = await claimed(store)
    reporter = reporter_of(store, job.lease)
    progress = {"job_id": str(job.id), "step": 1, "total_steps": 9, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-4}
    reporter.report(events.Progress.model_validate(progress | {"grad_norm": 1.0, "tokens_per_second": 50.0}))
    with database.connect() as owner, owner.transaction():
        owner.execute("LOCK TABLE metrics_points IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(30):
            ending = await settle(job, REFUSED, reporter, stop=Stop(), store=store, settings=settings)
    assert ending is not None and ending.state is State.FAILED
    assert database.job(job.id)["error_code"] == "invalid_spec"


@pytest.mark.parametrize("fault", ["RAISE EXCEPTION 'not today'", "INSERT INTO activity DEFAULT VALUES"])
async def test_an_ending_that_the_apps_own_trigger_refuses_is_told_as_what_it_is(
    store: SqlJobStore, database: AppDatabase, settings: Settings, fault: str
) -> None:
    database.run("CREATE TABLE activity (at timestamptz DEFAULT now())")
    database.run(f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {fault}; RETURN NULL; END$$")
    database.run(
        "CREATE TRIGGER refuse AFTER UPDATE ON training_jobs FOR EACH ROW "
        "WHEN (NEW.status = 'completed' OR NEW.progress > 50) EXECUTE FUNCTION refuse()"
    )
    job = await claimed(store)
    reporter = reporter_of(store, job.lease)
    reporter.enter(Stage.UPLOADING)
    done = Completed("lora-models/adapters/x.tar.gz", "0" * 64, 1)
    ending = await settle(job, done, reporter, stop=Stop(), store=store, settings=settings)
    assert ending is not None and ending.state is State.QUEUED
    row = database.job(job.id)
    assert row["error_code"] == "internal" and "refused" in row["error_message"] and row["error_stack"]
    assert database.run("SELECT FROM training_leases") == []


async def test_of_a_cancelled_job_the_story_says_what_was_saved(
    store: SqlJobStore, database: AppDatabase, settings: Settings
) -> None:
    job = await claimed(store)
    reporter = reporter_of(store, job.lease)
    about = {"job_id": str(job.id), "path": "step-40", "bytes": 1}
    reporter.report(events.CheckpointSaved.model_validate(about | {"step": 40}))
    progress = {"job_id": str(job.id), "step": 43, "total_steps": 90, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-4}
    reporter.report(events.Progress.model_validate(progress | {"grad_norm": 1.0, "tokens_per_second": 50.0}))
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job.id,))
    await settle(job, Cancelled(), reporter, stop=Stop(), store=store, settings=settings)
    told = database.one("SELECT data FROM training_events WHERE kind = 'stopped'")
    assert told["data"] == {"step": 43, "checkpoint_step": 40}


async def test_a_hurried_host_leaves_its_release_to_the_reaper_while_the_database_is_away(
    store: SqlJobStore, settings: Settings
) -> None:
    job = await claimed(store)
    stop = Stop()
    stop.request(StopReason.SHUTDOWN)
    stop.hurry()
    async with Database("postgresql://nobody@127.0.0.1:1/nowhere", application_name="test") as nobody:
        away = SqlJobStore(nobody)
        async with asyncio.timeout(settings.drain_seconds / 2):
            ending = await settle(
                job, Released("x"), reporter_of(away, job.lease), stop=stop, store=away, settings=settings
            )
    assert ending is None


@pytest.mark.parametrize("outcome", [Failed(ErrorCode.INTERNAL, "exit code 1", transient=True), REFUSED, Released("x")])
async def test_who_counted_his_lease_out_does_not_wait_to_tell_of_a_failure(
    store: SqlJobStore, settings: Settings, outcome: Failed | Released
) -> None:
    """It may be the heir's doing: a folder on a shared volume, taken from under the trainer."""
    job = await claimed(store)
    stop = Stop()
    async with Database("postgresql://nobody@127.0.0.1:1/nowhere", application_name="test") as nobody:
        away = SqlJobStore(nobody)
        settling = asyncio.create_task(
            settle(job, outcome, reporter_of(away, job.lease), stop=stop, store=away, settings=settings)
        )
        done, _ = await asyncio.wait({settling}, timeout=0.5)
        assert not done
        stop.request(StopReason.LEASE_LOST)
        async with asyncio.timeout(settings.drain_seconds / 2):
            assert await settling is None


async def test_an_adapter_that_is_stored_is_worth_any_wait(store: SqlJobStore, settings: Settings) -> None:
    job = await claimed(store)
    stop = Stop()
    stop.request(StopReason.LEASE_LOST)
    done = Completed("lora-models/adapters/x.tar.gz", "0" * 64, 1)
    ending = await settle(job, done, reporter_of(store, job.lease), stop=stop, store=store, settings=settings)
    assert ending is not None and ending.state is State.COMPLETED


async def test_an_ending_that_was_written_is_known_although_the_heartbeat_misses_its_lease(
    store: SqlJobStore, settings: Settings
) -> None:
    job = await claimed(store)
    stop = Stop()
    stop.request(StopReason.LEASE_LOST)
    ending = await settle(job, REFUSED, reporter_of(store, job.lease), stop=stop, store=store, settings=settings)
    assert ending is not None and ending.state is State.FAILED


def test_a_folder_that_vanishes_while_its_checkpoints_are_adopted_costs_the_heir_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last owner, on the same volume, removes or renames it at that very moment."""
    job_id = uuid4()
    first, second, third = (Lease(job_id, epoch, uuid4()) for epoch in (1, 2, 3))
    for lease in (first, second):
        (WorkFolder.open(tmp_path, lease).checkpoint_dir / "step").write_text(str(lease.epoch))
        # The second one took over from the first: put something back, as a host that was cut off does.
        WorkFolder(tmp_path, first).checkpoint_dir.mkdir(exist_ok=True)
        (WorkFolder(tmp_path, first).checkpoint_dir / "step").write_text("1")
    rename = Path.rename

    def too_late(self: Path, target: Path) -> Path:
        if self.name.startswith("e2-"):
            shutil.rmtree(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", too_late)
    heir = WorkFolder.open(tmp_path, third)
    assert (heir.checkpoint_dir / "step").read_text() == "1"


async def test_a_host_from_before_a_restore_deletes_no_object_of_who_shares_its_epoch(
    store: SqlJobStore, database: AppDatabase, settings: Settings, tmp_path: Path
) -> None:
    storage = FolderStorage(tmp_path)
    older = await claimed(store)
    # The rows go back to before this claim, and another host claims.
    database.run("SET session_replication_role = replica")
    database.run("DELETE FROM training_leases")
    database.run(
        "UPDATE training_jobs SET status = 'queued', due = true, attempt = 0, lease_epoch = lease_epoch - 1, "
        "lease_token = NULL WHERE id = %s",
        (older.id,),
    )
    database.run("SET session_replication_role = origin")
    younger = await claimed(store)
    assert younger.lease_epoch == older.lease_epoch
    kept = put(tmp_path, object_names(younger.id, younger.lease_epoch).archive)
    tidying = Cleanup(store, SqlUploadLog(store.database), storage, settings)
    tidying.begin(FinishedAttempt(older, None, stored=True))
    await tidying.finish()
    assert kept.exists()


def test_of_two_hosts_with_one_epoch_the_second_adopts_and_neither_writes_into_the_others_folder(
    tmp_path: Path,
) -> None:
    """A backup took the rows back in time: both hold epoch 2, and see one volume."""
    job_id = uuid4()
    older, younger = Lease(job_id, 2, uuid4()), Lease(job_id, 2, uuid4())
    before = WorkFolder.open(tmp_path, older)
    (before.checkpoint_dir / "step").write_text("10")
    now = WorkFolder.open(tmp_path, younger)
    assert (now.checkpoint_dir / "step").read_text() == "10" and not before.checkpoint_dir.exists()
    assert now.attempt_dir != before.attempt_dir
    before.forget_attempt()
    assert now.attempt_dir.exists()


class RecordingStorage(FolderStorage):
    """Remembers from which folders unfinished uploads were to be deleted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ended: list[str] = []

    async def end_unfinished_uploads(self, folder: Path) -> None:
        assert folder.is_dir(), "before its folder is deleted"
        self.ended.append(folder.name)


async def test_what_this_attempt_and_earlier_ones_left_unfinished_is_deleted_in_storage_first(
    store: SqlJobStore, settings: Settings, tmp_path: Path
) -> None:
    first = await claimed(store)
    dead = WorkFolder.open(settings.work_dir, first.lease)
    await store.release_job(first.lease, "its host dies", cost=None)
    job = await claimed(store)
    workspace = WorkFolder.open(settings.work_dir, job.lease)
    ending = await store.complete_job(job.lease, Completed("lora-models/a", "0" * 64, 1), cost=None)
    storage = RecordingStorage(tmp_path)
    tidying = Cleanup(store, SqlUploadLog(store.database), storage, settings)
    tidying.begin(FinishedAttempt(job, ending, stored=True))
    await tidying.finish()
    assert storage.ended == [workspace.attempt_dir.name, dead.attempt_dir.name] and not workspace.job_dir.exists()
