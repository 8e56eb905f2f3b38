"""A local folder as storage, with the same guarantees as Supabase Storage."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from daemon.errors import HostFault, disk_fault
from daemon.storage.interface import (
    DatasetSource,
    LocalFile,
    Location,
    StoredObject,
    dataset_absent,
    object_absent,
    safe_object_path,
    upload_mismatch,
)
from training.events import ErrorCode, HostPart
from training.files.durable_files import READ_BYTES, beside, put_in_place, sha256_of, sync, write_whole

IDENTITY_FILE = ".storage-id"


class FolderStorage:
    """Buckets as folders under one root: `<root>/<bucket>/<path>`. The default without Supabase."""

    def __init__(self, root: Path, bucket: str = "lora-models") -> None:
        self._root = root
        self._bucket = bucket

    @property
    def bucket(self) -> str:
        return self._bucket

    @cached_property
    def location(self) -> Location:
        return Location(f"folder {_identity_of(self._root)}", self._bucket)

    async def open_dataset(self, bucket: str, path: str) -> DatasetSource:
        file = self._locate(bucket, path)
        if not file.is_file():
            raise dataset_absent(bucket, path)
        # A symbolic link inside the folder must not lead out of it.
        if not file.resolve().is_relative_to((self._root / bucket).resolve()):
            raise dataset_absent(bucket, path)
        return LocalFile(file)

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        del resume_dir  # copying again on one machine is faster than resuming
        size = (await asyncio.to_thread(local.stat)).st_size
        if not await self.verify(object_path, size, sha256):
            await _copy(local, self._locate(self._bucket, object_path))
            if not await self.verify(object_path, size, sha256):
                raise upload_mismatch(f"{self._bucket}/{object_path}", size, sha256)
        return StoredObject(object_path, size, sha256)

    async def verify(self, object_path: str, size: int, sha256: str) -> bool:
        file = self._locate(self._bucket, object_path)
        if not file.is_file() or file.stat().st_size != size:
            return False
        return await asyncio.to_thread(sha256_of, file) == sha256

    async def exists(self, object_path: str) -> bool:
        return self._locate(self._bucket, object_path).is_file()

    async def download(self, object_path: str, to: Path) -> StoredObject:
        file = self._locate(self._bucket, object_path)
        if not file.is_file():
            raise object_absent(self._bucket, object_path)
        size = await _copy(file, to, into="work folder")
        return StoredObject(object_path, size, await asyncio.to_thread(sha256_of, to))

    async def delete(self, object_path: str) -> None:
        file = self._locate(self._bucket, object_path)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise disk_fault("storage folder", file.parent, error) from error
        # Buckets have no folders: deleting the last object of a folder removes the folder.
        with contextlib.suppress(OSError):
            file.parent.rmdir()

    async def prove(self) -> None:
        """Nothing to prove: the folder is a part of the host with a probe of its own."""

    async def end_unfinished_uploads(self, folder: Path) -> None:
        """There are none: a copy is whole or removed."""

    async def check(self, expected_bytes: int) -> str | None:
        folder = self._root / self._bucket
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise disk_fault("storage folder", folder, error) from error
        if free < expected_bytes:
            raise HostFault(
                "storage folder",
                ErrorCode.DISK_FULL,
                f"The storage folder of the host is full: the adapter needs about {expected_bytes:,} bytes.",
                detail=f"{folder} has {free:,} bytes left and an adapter needs about {expected_bytes:,}",
            )
        return None

    async def close(self) -> None:
        """There is nothing to close."""

    def _locate(self, bucket: str, path: str) -> Path:
        return self._root / safe_object_path(bucket) / safe_object_path(path)


async def _copy(source: Path, target: Path, *, into: HostPart = "storage folder") -> int:
    """Copies a file and returns its size. If cancelled, it leaves nothing behind, now or later."""
    given_up = threading.Event()
    copying = asyncio.ensure_future(asyncio.to_thread(_copy_atomically, source, target, into, given_up))
    try:
        return await asyncio.shield(copying)
    except asyncio.CancelledError:
        # Cancelling does not end a thread.
        given_up.set()
        await asyncio.gather(copying, return_exceptions=True)
        raise


def _copy_atomically(source: Path, target: Path, into: HostPart, given_up: threading.Event) -> int:
    """Copies atomically: a reader sees the old file, none, or the whole new one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside(target) as hidden:
            with source.open("rb") as reading, hidden.open("wb") as writing:
                while (piece := reading.read(READ_BYTES)) and not given_up.is_set():
                    writing.write(piece)
                size = writing.tell()
            if not given_up.is_set():
                # A step of its own: it may take a while, and the copy may be cancelled meanwhile.
                sync(hidden)
            if not given_up.is_set():
                put_in_place(hidden, target)
        return size
    except OSError as error:
        raise disk_fault(into, target.parent, error) from error


def _identity_of(root: Path) -> str:
    """Returns the identity stored in the folder: all hosts that mount it agree on it, under whatever path."""
    file = root / IDENTITY_FILE
    try:
        if not file.exists():
            root.mkdir(parents=True, exist_ok=True)
            write_whole(file, f"{uuid4()}\n")
        # Read back: another host may have written it at the same moment.
        return file.read_text().strip()
    except OSError as error:
        raise disk_fault("storage folder", root, error) from error
