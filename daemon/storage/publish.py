"""Stores a finished adapter: the archive first, the manifest last, each read back before it counts."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from daemon.queue.outcome import Completed
from daemon.storage.archive import MANIFEST, pack_adapter
from daemon.storage.interface import Storage

log = structlog.get_logger()


# Artifact names that the app shows, each with its file in the adapter folder.
BESIDE = {
    "adapter_model": "adapter_model.safetensors",
    "adapter_config": "adapter_config.json",
    "training_logs": "training_log.jsonl",
    "metrics_chart": "metrics_chart.png",
    "tensorboard": "training.tfevents",
}


@dataclass(frozen=True)
class ObjectNames:
    """The names of one attempt's objects in the bucket."""

    archive: str
    folder: str

    def beside(self, file_name: str) -> str:
        return f"{self.folder}/{file_name}"

    def all(self) -> tuple[str, ...]:
        """Every name that this attempt may have written, the archive first."""
        return (self.archive, *(self.beside(name) for name in (*BESIDE.values(), MANIFEST)))


def object_names(job_id: UUID | str, lease_epoch: int) -> ObjectNames:
    """`adapters/<job_id>.tar.gz` for the first lease; the names of later leases contain their epoch."""
    stem = f"adapters/{job_id}" if lease_epoch <= 1 else f"adapters/{job_id}-e{lease_epoch}"
    return ObjectNames(f"{stem}.tar.gz", stem)


async def publish_adapter(  # noqa: PLR0917 - what, whose, and where, in the order of the story
    storage: Storage,
    adapter_dir: Path,
    job_id: UUID | str,
    lease_epoch: int,
    manifest_facts: Mapping[str, Any],
    work_dir: Path,
) -> Completed:
    """Packs, uploads and verifies, the manifest last. Killed at any point and called again, it stores the same objects.

    `manifest_facts` become part of the manifest: base model and revision, spec, versions; JSON, no secret.
    Raises JobFailed when the folder is no adapter, else what the storage raises.
    """
    names = object_names(job_id, lease_epoch)
    work_dir = work_dir / "publish"
    packed = await asyncio.to_thread(pack_adapter, adapter_dir, work_dir / Path(names.archive).name, manifest_facts)
    archive = await storage.upload(packed.path, names.archive, sha256=packed.archive.sha256, resume_dir=work_dir)
    artifacts = {"archive": names.archive}
    hashes = {file.name: file.sha256 for file in packed.files}
    for artifact, file_name in BESIDE.items():
        if file_name in hashes:
            path = names.beside(file_name)
            await storage.upload(adapter_dir / file_name, path, sha256=hashes[file_name], resume_dir=work_dir)
            artifacts[artifact] = path
    manifest = work_dir / MANIFEST
    await asyncio.to_thread(manifest.write_bytes, packed.manifest)
    path = names.beside(MANIFEST)
    await storage.upload(manifest, path, sha256=hashlib.sha256(packed.manifest).hexdigest(), resume_dir=work_dir)
    artifacts["manifest"] = path
    log.info("adapter_published", object=names.archive, bytes=archive.bytes, sha256=archive.sha256)
    await asyncio.to_thread(shutil.rmtree, work_dir, True)
    return Completed(f"{storage.bucket}/{names.archive}", archive.sha256, archive.bytes, artifacts)


async def withdraw_adapter(storage: Storage, job_id: UUID | str, lease_epoch: int) -> None:
    """Deletes what one attempt may have stored. Only for an attempt whose objects the row is known not to name."""
    for name in object_names(job_id, lease_epoch).all():
        await storage.delete(name)
