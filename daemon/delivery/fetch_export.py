"""Fetches a stored export into a new folder, each file compared with its manifest, the manifest with the job's row."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from daemon.delivery.exported import MANIFEST
from daemon.errors import JobError, JobFailed, disk_fault
from daemon.storage.interface import Storage
from training.events import ErrorCode
from training.files.durable_files import put_in_place, sha256_of

OnBytes = Callable[[int, int], None]  # bytes done, total bytes

# A file, or a file in a folder, as in an adapter's archive.
_SAFE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9][A-Za-z0-9._-]{0,199})?$")


async def fetch_export(
    storage: Storage, result: Mapping[str, Any], folder: Path, on_bytes: OnBytes = lambda _done, _total: None
) -> dict[str, Any]:
    """Returns the manifest. Interrupted and called again, it fetches only what is missing.

    Raises JobFailed if an object is absent, or is not the one that was stored, else what the storage raises."""
    folder = folder.absolute()
    part = folder.with_name(f".{folder.name}.part")
    manifest = await _fetch_manifest(storage, result, part)
    files: dict[str, dict[str, Any]] = dict(manifest["files"])
    await asyncio.to_thread(_remove_others, part, files)
    total, done = sum(file["bytes"] for file in files.values()), 0
    prefix = _inside_bucket(storage, str(result["path"]))
    for name, file in files.items():
        if not _SAFE_NAME.fullmatch(name):
            raise _altered(name)
        target = part / name
        if not await asyncio.to_thread(_is_there, target, file):
            await _prepare(target.parent)
            stored = await storage.download(f"{prefix}/{name}", target)
            if (stored.bytes, stored.sha256) != (file["bytes"], file["sha256"]):
                target.unlink(missing_ok=True)
                raise _altered(name)
        done += file["bytes"]
        on_bytes(done, total)
    await asyncio.to_thread(put_in_place, part, folder)
    return manifest


async def _fetch_manifest(storage: Storage, result: Mapping[str, Any], part: Path) -> dict[str, Any]:
    await _prepare(part)
    file = part / MANIFEST
    stored = await storage.download(_inside_bucket(storage, str(result["manifest"])), file)
    if stored.sha256 != result["manifest_sha256"]:
        file.unlink(missing_ok=True)
        raise _altered(MANIFEST)
    manifest: dict[str, Any] = json.loads(await asyncio.to_thread(file.read_bytes))
    return manifest


def _inside_bucket(storage: Storage, path: str) -> str:
    bucket, _, inside = path.partition("/")
    if bucket != storage.bucket:
        raise JobFailed(
            ErrorCode.UPLOAD_FAILED,
            f"The export is in the bucket {bucket}, not in {storage.bucket}.",
            "Set TRAINER_MODELS_BUCKET to the bucket in which it was stored.",
        )
    return inside


def _is_there(target: Path, file: Mapping[str, Any]) -> bool:
    return target.is_file() and target.stat().st_size == file["bytes"] and sha256_of(target) == file["sha256"]


def _remove_others(part: Path, files: Mapping[str, Any]) -> None:
    """Removes what another export left, when its download into this folder was interrupted."""
    for path in list(part.rglob("*")):
        if path.is_file() and path.relative_to(part).as_posix() not in (*files, MANIFEST):
            path.unlink()


async def _prepare(folder: Path) -> None:
    try:
        await asyncio.to_thread(lambda: folder.mkdir(parents=True, exist_ok=True))
    except OSError as error:
        raise disk_fault("work folder", folder.parent, error) from error


def _altered(name: str) -> JobError:
    return JobFailed(
        ErrorCode.UPLOAD_FAILED,
        f"The stored file {name} is not the one of this export: its bytes have another hash.",
        "Do not use it: the object in storage was changed. Ask for the export again.",
    )
