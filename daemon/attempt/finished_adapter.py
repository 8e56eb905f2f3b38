"""Keeps an adapter whose training has ended until it is stored, and finds it for a later attempt.

It is not trained a second time. Beside the adapter lies a record: what it was trained from, in one hash, and the hash
of each file. A later attempt of the same spec takes it over from the volume, else from the archive in storage, and
compares every file first.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import structlog

from daemon.attempt.work_folder import ADAPTER, FINISHED, WorkFolder
from daemon.database.retry import retry_until_database_is_back
from daemon.errors import JobFailed, disk_fault
from daemon.queue.job import ClaimedJob
from daemon.report.reporter import Reporter
from daemon.storage.archive import ArchiveInvalid, unpack_adapter
from daemon.storage.interface import Storage
from daemon.storage.upload_log import UploadLog
from training.files.durable_files import put_in_place, sha256_of, write_whole
from training.spec import Hyperparameters

log = structlog.get_logger()

# Not part of what the adapter is trained from: the model is compared by the name that was used.
_DECIDES_NOTHING = {"base_model", "trackers", "exports", "push_to_hub", "deploy"}
# What the manifest of an archive has beside the facts.
_OF_THE_ARCHIVE = ("format", "files", "archive")


@dataclass(frozen=True)
class FinishedAdapter:
    """A trained adapter on this host's disk. `facts` go into its manifest: settings, versions, how training went."""

    folder: Path
    facts: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(self.facts.get("summary") or {})

    @property
    def trained_with(self) -> dict[str, Any]:
        return dict(self.facts.get("trained_with") or {})

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


def spec_hash(base_model: str, hyperparameters: Hyperparameters, dataset_sha256: str) -> str:
    """Returns one hash of what decides about an adapter: with another one, a finished adapter is of no use.

    Defaults are left out: a newer version may have more settings, and does not train otherwise because of them."""
    asked = hyperparameters.model_dump(mode="json", exclude_defaults=True, exclude=_DECIDES_NOTHING)
    document = {"base_model": base_model, "dataset_sha256": dataset_sha256, "hyperparameters": asked}
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def keep_finished(workspace: WorkFolder, folder: Path, facts: Mapping[str, Any]) -> FinishedAdapter:
    """Writes the record of this attempt's adapter: from now on a later attempt need not train."""
    record = {"facts": facts, "files": _hashes(folder)}
    try:
        write_whole(workspace.finished_path, json.dumps(record, default=str))
    except OSError as error:
        raise disk_fault("work folder", workspace.attempt_dir, error) from error
    return FinishedAdapter(folder, dict(facts))


class EarlierAdapters:
    """The adapters that earlier attempts at this job have finished, here and in storage."""

    def __init__(self, uploads: UploadLog, storage: Storage, job: ClaimedJob, workspace: WorkFolder) -> None:
        self._uploads = uploads
        self._storage = storage
        self._job = job
        self._workspace = workspace

    async def adopt(self, asked: Hyperparameters, dataset_sha256: str, reporter: Reporter) -> FinishedAdapter | None:
        """Returns a finished adapter of this spec and data, now in this attempt's folder; None if there is none.

        Raises JobDelayed when the storage cannot be reached now: hours of training are worth another attempt."""
        # An attempt that has trained has written its base model into the row.
        base_model = asked.base_model or self._job.base_model
        if self._job.lease_epoch <= 1 or base_model is None:
            return None
        wanted = spec_hash(base_model, asked, dataset_sha256)
        try:
            adapter = await asyncio.to_thread(self._adopt_on_volume, wanted)
        except OSError as error:
            raise disk_fault("work folder", self._workspace.attempt_dir, error) from error
        adapter = adapter or await self._adopt_from_storage(wanted)
        if adapter is not None:
            reporter.train_with(adapter.trained_with)
            reporter.tell("adapter_adopted", "An earlier attempt has finished the adapter: it is only stored now.")
            await self._storage.check(adapter.bytes)
        return adapter

    def _adopt_on_volume(self, wanted: str) -> FinishedAdapter | None:
        for earlier in self._workspace.earlier_attempts():
            adapter = earlier / ADAPTER
            record = _read_record(earlier / FINISHED)
            if record is None or record["facts"].get("spec_sha256") != wanted or not adapter.is_dir():
                continue
            try:
                if _hashes(adapter) != record["files"]:
                    log.warning("finished_adapter_differs", attempt=earlier.name)
                    continue
                # The record first: if this host dies in between, the next one still finds adapter and record there.
                write_whole(self._workspace.finished_path, json.dumps(record))
                put_in_place(adapter, self._workspace.adapter_dir)
            except FileNotFoundError:
                continue  # its host has just deleted it
            return FinishedAdapter(self._workspace.adapter_dir, record["facts"])
        return None

    async def _adopt_from_storage(self, wanted: str) -> FinishedAdapter | None:
        job, storage = self._job, self._storage
        stored = await retry_until_database_is_back(
            lambda: self._uploads.stored_adapters(job.id, storage.location), "adapter_not_asked_for"
        )
        archive = self._workspace.attempt_dir / "fetched.tar.gz"
        for upload in stored:
            if upload.epoch >= job.lease_epoch or not await storage.exists(upload.objects[0]):
                continue
            try:
                await storage.download(upload.objects[0], archive)
                manifest = await asyncio.to_thread(unpack_adapter, archive, self._workspace.adapter_dir)
            except (ArchiveInvalid, JobFailed) as error:
                log.warning("stored_adapter_ignored", object=upload.objects[0], error=str(error))
                continue
            finally:
                archive.unlink(missing_ok=True)
            if manifest.get("spec_sha256") == wanted:
                facts = {name: value for name, value in manifest.items() if name not in _OF_THE_ARCHIVE}
                return await asyncio.to_thread(keep_finished, self._workspace, self._workspace.adapter_dir, facts)
            await asyncio.to_thread(shutil.rmtree, self._workspace.adapter_dir)
        return None


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file in the folder. A manifest that an archive brought along is no part of the adapter."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def _read_record(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text())
        return {"facts": dict(record["facts"]), "files": dict(record["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
