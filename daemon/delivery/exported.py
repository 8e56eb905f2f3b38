"""Makes an export of an adapter in a process of its own, and stores it beside the adapter: its files, a manifest last.

A folder of objects and not one archive: a model of 160 GB stays within Storage's limit of a file, each file is uploaded
and verified by itself, and whoever needs one file fetches one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from daemon.base_model.candidates import ResolvedModel
from daemon.delivery.context import DeliveryContext
from daemon.delivery.delivery import Delivery
from daemon.errors import HostFault, JobDelayed, JobError, JobFailed, disk_fault
from daemon.storage.archive import PICKLES
from daemon.storage.publish import object_names
from daemon.trainer.export_process import run_export
from training.events import ErrorCode
from training.files.durable_files import sha256_of, write_whole

log = structlog.get_logger()

# A merged model has a manifest.json of its own.
MANIFEST = "delivery.json"
MANIFEST_FORMAT = 1
# Written once the process has ended well: a later try on this disk only has to store what is there.
MADE = "made.json"
# Besides the export itself: an adapter, logs, a file system's own needs.
SPARE_BYTES = 2**30


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str


def export_folder(delivery: Delivery) -> str:
    """Returns where an export's objects are: beside the adapter's, and under another name after each lost claim."""
    folder = f"{object_names(delivery.job_id, delivery.lease_epoch).folder}/{delivery.kind}"
    return folder if delivery.claims <= 1 else f"{folder}-{delivery.claims}"


async def export_and_store(
    delivery: Delivery, context: DeliveryContext, *, needs_base: bool = True, is_model: bool = False
) -> dict[str, Any]:
    """Makes the export that the delivery's kind names, stores it and returns where it is.

    `needs_base`: not from the adapter alone. `is_model`: as large as the base model. Killed at any point and called
    again, it stores the same; what is on this disk already is not made again."""
    made = context.folder / "export"
    facts = await asyncio.to_thread(_read_made, context.folder)
    if facts is None:
        facts = await _make(delivery, context, made, needs_base=needs_base, is_model=is_model)
    files = await asyncio.to_thread(_hash_files, made)
    return await _store(delivery, context, made, files, facts)


async def _make(
    delivery: Delivery, context: DeliveryContext, into: Path, *, needs_base: bool, is_model: bool
) -> dict[str, Any]:
    model = await context.base_model() if needs_base else None
    await asyncio.to_thread(_check_room, context, model if is_model else None)
    adapter = await context.adapter_folder()
    await asyncio.to_thread(shutil.rmtree, into, True)
    request: dict[str, Any] = {"kind": delivery.kind, "adapter": adapter, "into": into}
    if model is not None:
        request |= {"base": model.path, "base_model": model.name, "base_revision": model.revision}
    log.info("export_begins", job_id=str(delivery.job_id), kind=delivery.kind)
    try:
        result = await run_export(request, gently=True)
    except HostFault as error:
        # It may be the export that kills its process: a try that counts, so that it comes to an end.
        raise JobDelayed(
            error.code,
            error.message,
            "If this repeats, the hosts may have too little memory for it: ask for it again on a larger one.",
            detail=error.detail,
        ) from error
    except JobFailed as error:
        if error.code is ErrorCode.DISK_FULL:
            # The disk is this host's, not the export's.
            raise disk_full(context, error) from error
        raise
    # Paths of this host are nobody's business, and the files are listed with their sizes below.
    facts = {name: value for name, value in result.items() if name not in ("path", "files", "bytes")}
    try:
        await asyncio.to_thread(write_whole, context.folder / MADE, json.dumps(facts, default=str))
    except OSError as error:
        raise disk_fault("work folder", context.folder, error) from error
    return facts


async def _store(
    delivery: Delivery, context: DeliveryContext, made: Path, files: dict[str, StoredFile], facts: dict[str, Any]
) -> dict[str, Any]:
    storage, folder, resume_dir = context.storage, export_folder(delivery), context.folder / "upload"
    await _check_limit(context, delivery, max(file.bytes for file in files.values()))
    await context.record_objects([f"{folder}/{name}" for name in (*files, MANIFEST)])
    for name, file in files.items():
        await storage.upload(made / name, f"{folder}/{name}", sha256=file.sha256, resume_dir=resume_dir)
    manifest = context.folder / MANIFEST
    text = json.dumps(_manifest(delivery, files, facts), indent=2, sort_keys=True).encode()
    await asyncio.to_thread(manifest.write_bytes, text)
    manifest_sha256 = hashlib.sha256(text).hexdigest()
    await storage.upload(manifest, f"{folder}/{MANIFEST}", sha256=manifest_sha256, resume_dir=resume_dir)
    total = sum(file.bytes for file in files.values())
    log.info("export_stored", job_id=str(delivery.job_id), kind=delivery.kind, files=len(files), bytes=total)
    return {
        "path": f"{storage.bucket}/{folder}",
        "manifest": f"{storage.bucket}/{folder}/{MANIFEST}",
        "manifest_sha256": manifest_sha256,
        "bytes": total,
        "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()},
        "claims": delivery.claims,
        **facts,
    }


def _manifest(delivery: Delivery, files: dict[str, StoredFile], facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "job_id": str(delivery.job_id),
        "kind": delivery.kind,
        "base_model": delivery.model_name,
        "base_model_revision": delivery.model_revision,
        "adapter": {"path": delivery.adapter_path, "sha256": delivery.adapter_sha256},
        **facts,
        "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()},
    }


def _hash_files(folder: Path) -> dict[str, StoredFile]:
    """The files of an export by their names, largest last: a refused limit is found by the check before."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    for path in files:
        if path.is_symlink() or path.suffix in PICKLES:
            raise JobFailed(
                ErrorCode.INTERNAL,
                f"The export holds {path.relative_to(folder).as_posix()!r}, which must not be stored.",
                "This is a fault of the service, not of your job. Report it with the job's id.",
            )
    if not files:
        raise JobFailed(
            ErrorCode.INTERNAL,
            "The export holds no file.",
            "This is a fault of the service, not of your job. Report it with the job's id.",
        )
    return {path.relative_to(folder).as_posix(): StoredFile(path.stat().st_size, sha256_of(path)) for path in files}


def _read_made(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / MADE).read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and (folder / "export").is_dir() else None


async def _check_limit(context: DeliveryContext, delivery: Delivery, largest_bytes: int) -> None:
    """Says that a bucket's limit is too low in words about this export, not about the adapter."""
    try:
        await context.storage.check(largest_bytes)
    except JobFailed as error:
        raise JobFailed(
            error.code,
            f"The bucket {context.storage.bucket} does not accept the export {delivery.kind}, whose largest file has "
            f"{largest_bytes:,} bytes: {error.message}",
            "Raise the bucket's file size limit, or remove its list of MIME types, and ask for the delivery again.",
            detail=error.detail,
        ) from error


def _check_room(context: DeliveryContext, model: ResolvedModel | None) -> None:
    """Raises HostFault if the work folder has no room for an export, or for one of this model's size: before hours of
    writing, not after."""
    weights = () if model is None else model.path.glob("*.safetensors")
    needed = sum(path.stat().st_size for path in weights) + SPARE_BYTES
    folder = context.settings.work_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise disk_fault("work folder", folder, error) from error
    if free < needed:
        raise disk_fault("work folder", folder, OSError(28, os.strerror(28)))


def disk_full(context: DeliveryContext, error: JobError) -> JobError:
    """Returns the fault of this host behind an export that found its disk full."""
    fault = disk_fault("work folder", context.settings.work_dir, OSError(28, os.strerror(28)))
    fault.detail = f"{fault.detail}; {error.message}"
    return fault
