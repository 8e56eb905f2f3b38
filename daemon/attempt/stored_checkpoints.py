"""Keeps checkpoints in storage beside the adapters, so that a host in another datacenter can resume.

The newest is uploaded in the background, one at a time, and delays no step; a failure is reported as an event and does
not fail the training. A stored checkpoint counts once the database has the hash of its manifest, which is uploaded
last; before it is used here, every file is compared with that manifest. Whether it belongs to this run (data,
settings, versions) is decided by the trainer when it reads it, as for a local one.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from daemon.attempt.work_folder import WorkFolder
from daemon.database.retry import retry_until_database_is_back
from daemon.errors import DatabaseAway, JobError, JobFailed, LeaseLost, StatementRefused, TrainerError
from daemon.queue.job import ClaimedJob
from daemon.stop_request import Stop
from daemon.storage.interface import Storage
from daemon.storage.sweep import withdraw
from daemon.storage.upload_log import RecordedUpload, UploadLog
from training.files.durable_files import put_in_place, sha256_of

log = structlog.get_logger()

MANIFEST = "manifest.json"
# How often the wait for the last upload checks whether it must hurry.
LOOK_SECONDS = 0.25

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Tell = Callable[[str, str, dict[str, Any]], None]


class CheckpointUnusable(TrainerError):
    """A checkpoint that must not be stored or resumed from; the message says why."""


@dataclass(frozen=True)
class CheckpointManifest:
    """The trainer's own list of a checkpoint's contents: step, and the sha256 of each file."""

    step: int
    files: dict[str, str]


def read_manifest(text: bytes) -> CheckpointManifest:
    """Parses a manifest. Raises CheckpointUnusable unless every name is plain and every hash a sha256."""
    try:
        document = json.loads(text)
        manifest = CheckpointManifest(int(document["step"]), dict(document["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointUnusable(f"its manifest cannot be read ({type(error).__name__})") from error
    for name, sha256 in manifest.files.items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST or not _SHA256.fullmatch(str(sha256)):
            raise CheckpointUnusable(f"its manifest lists {name[:100]!r}, which is not a file of a checkpoint")
    return manifest


def newest_whole_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint in the folder whose files match its manifest; -1 without one."""
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    for step in sorted(steps, reverse=True):
        try:
            manifest = read_manifest((steps[step] / MANIFEST).read_bytes())
            if all(sha256_of(steps[step] / name) == sha256 for name, sha256 in manifest.files.items()):
                return step
        except (OSError, CheckpointUnusable):
            continue
    return -1


class CheckpointStore:
    """One attempt's checkpoints in storage. `tell` adds an event to the job's history."""

    def __init__(
        self, uploads: UploadLog, storage: Storage, job: ClaimedJob, workspace: WorkFolder, tell: Tell
    ) -> None:
        self._uploads = uploads
        self._storage = storage
        self._job = job
        self._workspace = workspace
        self.tell = tell
        self._newest: int | None = None
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        self._given_up = False

    # -- from Storage ---------------------------------------------------------------------------------------------

    async def fetch(self) -> None:
        """Downloads the newest stored checkpoint, unless this host has one as new.

        A damaged or foreign one is skipped. Raises JobDelayed when the storage cannot be reached now: hours of
        training are worth another attempt.
        """
        stored = await retry_until_database_is_back(
            lambda: self._uploads.stored_checkpoints(self._job.id, self._storage.location), "checkpoint_not_asked_for"
        )
        whole = [upload for upload in stored if upload.manifest_sha256 is not None]
        if not whole:
            return
        here = await asyncio.to_thread(newest_whole_step, self._workspace.checkpoint_dir)
        for upload in whole:
            if upload.step <= here:
                return
            try:
                size = await self._download(upload)
            except (CheckpointUnusable, JobFailed) as error:
                self.tell(
                    "stored_checkpoint_ignored",
                    f"The checkpoint of step {upload.step} in storage is not used: {error}",
                    {"step": upload.step, "reason": str(error)},
                )
                continue
            self.tell(
                "checkpoint_fetched",
                f"The checkpoint of step {upload.step} was downloaded from storage.",
                {"step": upload.step, "bytes": size},
            )
            return

    async def _download(self, upload: RecordedUpload) -> int:
        """Downloads one checkpoint to a hidden folder, compares every file, and renames it. Returns its bytes."""
        part = self._workspace.checkpoint_dir / f".fetching-{upload.step}"
        await asyncio.to_thread(shutil.rmtree, part, True)
        try:
            fetched = await self._storage.download(upload.objects[-1], part / MANIFEST)
            if fetched.sha256 != upload.manifest_sha256:
                raise CheckpointUnusable("its manifest is not the one that was stored")
            manifest = read_manifest(await asyncio.to_thread((part / MANIFEST).read_bytes))
            folder = upload.objects[-1].rpartition("/")[0]
            size = fetched.bytes
            for name, sha256 in manifest.files.items():
                fetched = await self._storage.download(f"{folder}/{name}", part / name)
                if fetched.sha256 != sha256:
                    raise CheckpointUnusable(f"{name} has a different hash than when it was written")
                size += fetched.bytes
            await asyncio.to_thread(put_in_place, part, self._workspace.checkpoint_dir / f"checkpoint-{upload.step}")
        finally:
            await asyncio.to_thread(shutil.rmtree, part, True)
        return size

    # -- to Storage -----------------------------------------------------------------------------------------------

    def offer(self, step: int) -> None:
        """Offers a checkpoint that the trainer saved. Never waits; the newest one offered is stored next."""
        self._newest = step
        if not self._given_up and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._keep_newest(), name=f"checkpoints {self._job.id}")

    async def finish(self, grace_seconds: float, stop: Stop) -> None:
        """Waits for the current upload and the newest checkpoint, at most `grace_seconds`. Nothing runs on return."""
        task = self._task
        if task is None:
            return
        give_up_at = asyncio.get_running_loop().time() + grace_seconds
        while not task.done() and not stop.hurried and asyncio.get_running_loop().time() < give_up_at:
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _keep_newest(self) -> None:
        while (step := self._newest) is not None and not self._given_up:
            self._newest = None
            try:
                await self._keep(step)
                self._failing = False
            except LeaseLost:
                self._given_up = True
            except (JobError, DatabaseAway, StatementRefused, CheckpointUnusable, OSError) as error:
                self._note_failure(step, error)
            except Exception as error:  # nothing awaits this task: log it here
                log.exception("checkpoint_not_kept", step=step)
                self._note_failure(step, error)

    def _note_failure(self, step: int, error: Exception) -> None:
        # A permanent error (too large for the bucket, say) ends the uploads; a transient one is reported once.
        self._given_up = isinstance(error, JobFailed)
        if not self._failing:
            self.tell(
                "checkpoint_not_stored",
                f"The checkpoint of step {step} could not be uploaded; training continues. The error: {error}",
                {"step": step, "reason": str(error), "given_up": self._given_up},
            )
        self._failing = True

    async def _keep(self, step: int) -> None:
        """Uploads one checkpoint, its manifest last, then deletes the job's other ones."""
        source = self._workspace.checkpoint_dir / f"checkpoint-{step}"
        frozen = self._workspace.attempt_dir / "checkpoint"
        manifest_sha256 = await asyncio.to_thread(_freeze, source, frozen)
        if manifest_sha256 is None:
            return  # two newer ones have replaced it: they come next
        manifest = read_manifest(await asyncio.to_thread((frozen / MANIFEST).read_bytes))
        folder = f"checkpoints/{self._job.id}/e{self._job.lease_epoch}-step{step}"
        hashes = {**manifest.files, MANIFEST: manifest_sha256}
        objects = [f"{folder}/{name}" for name in hashes]
        await self._uploads.record_upload(self._job.lease, "checkpoint", self._storage.location, objects, step=step)
        size = 0
        for name, sha256 in hashes.items():
            stored = await self._storage.upload(
                frozen / name, f"{folder}/{name}", sha256=sha256, resume_dir=self._workspace.upload_dir
            )
            size += stored.bytes
        await self._uploads.finish_checkpoint_upload(self._job.lease, step, manifest_sha256=manifest_sha256, size=size)
        self.tell("checkpoint_stored", f"The checkpoint of step {step} is in storage.", {"step": step, "bytes": size})
        for other in await self._uploads.stored_checkpoints(self._job.id, self._storage.location):
            if (other.epoch, other.step) != (self._job.lease_epoch, step):
                await withdraw(self._uploads, self._storage, other)


def _freeze(source: Path, frozen: Path) -> str | None:
    """Makes hard links to the checkpoint's files, which the trainer may delete meanwhile but never rewrites.

    Returns the manifest's sha256, None when the checkpoint is gone."""
    shutil.rmtree(frozen, ignore_errors=True)
    frozen.mkdir(parents=True)
    try:
        for path in source.iterdir():
            try:
                os.link(path, frozen / path.name)
            except FileNotFoundError:
                raise
            except OSError:  # a volume without hard links
                shutil.copyfile(path, frozen / path.name)
        return sha256_of(frozen / MANIFEST)
    except FileNotFoundError:
        return None
