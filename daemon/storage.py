"""The port to object storage: where datasets are read and adapters kept. The folder below is its plainest form.

Everything that an implementation promises is promised to the worker: an upload that returned is whole and
its hash was read back; one that was interrupted goes on where it stopped; nobody else's object is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol
from uuid import uuid4

from daemon.errors import HostFault, JobDelayed, JobFailed, disk_fault
from daemon.settings import Settings
from training.events import ErrorCode, HostPart

READ_BYTES = 1024 * 1024
IDENTITY_FILE = ".storage-id"

# What Supabase Storage accepts as a key: ASCII without '#', '%' and backslash.
_OBJECT_PATH = re.compile(r"^[A-Za-z0-9!_.*'()&$@=;:+,?\- /]{1,900}$")


@dataclass(frozen=True)
class StoredObject:
    """An object that was read back: path inside its bucket, size, hash."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Location:
    """Which bucket, and of which storage: two projects, or two hosts' folders, may each have one of the same name."""

    storage: str
    bucket: str


@dataclass(frozen=True)
class SignedUrl:
    """A dataset behind a URL that is a secret and expires; ask for another when it has."""

    url: str


@dataclass(frozen=True)
class LocalFile:
    """A dataset on this machine."""

    path: Path


DatasetSource = SignedUrl | LocalFile


class Storage(Protocol):
    """What the daemon needs of a storage. Paths are inside the bucket, posix, relative.

    Methods raise JobDelayed when another attempt may succeed and JobFailed when it would not.
    """

    @property
    def bucket(self) -> str:
        """The bucket that adapters go to."""

    @property
    def location(self) -> Location:
        """Where that bucket is, in the same words on every host that sees it. May raise JobDelayed."""

    async def open_dataset(self, bucket: str, path: str) -> DatasetSource:
        """Where a dataset can be read now. Raises JobFailed(dataset_unreachable) when there is none."""

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        """Store a file and read it back. Interrupted, by a kill too, it goes on from what `resume_dir` remembers."""

    async def verify(self, object_path: str, size: int, sha256: str) -> bool:
        """True when the stored object has this size and, read back, this hash; False when absent or different."""

    async def exists(self, object_path: str) -> bool:
        """True when the object is there."""

    async def download(self, object_path: str, to: Path) -> StoredObject:
        """Stream an object into a file, whole or not at all. Raises JobFailed when it is absent."""

    async def delete(self, object_path: str) -> None:
        """Remove the object; absent is fine."""

    async def check(self, expected_bytes: int) -> None:
        """Before hours of training: the bucket exists (or is created) and takes a file of this size."""

    async def close(self) -> None:
        """Let go of connections."""


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
        # A link inside the folder must not lead out of it.
        if not file.resolve().is_relative_to((self._root / bucket).resolve()):
            raise dataset_absent(bucket, path)
        return LocalFile(file)

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        del resume_dir  # A copy inside one machine is quicker than remembering where it stopped.
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
            raise JobFailed(ErrorCode.UPLOAD_FAILED, f"{self._bucket}/{object_path} is not in storage ({self._root})")
        size = await _copy(file, to, into="work folder")
        return StoredObject(object_path, size, await asyncio.to_thread(sha256_of, to))

    async def delete(self, object_path: str) -> None:
        file = self._locate(self._bucket, object_path)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise disk_fault("storage folder", file.parent, error) from error
        # Buckets have no folders: the last object of one takes it along.
        with contextlib.suppress(OSError):
            file.parent.rmdir()

    async def check(self, expected_bytes: int) -> None:
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

    async def close(self) -> None:
        """Nothing is held."""

    def _locate(self, bucket: str, path: str) -> Path:
        return self._root / safe_object_path(bucket) / safe_object_path(path)


def safe_object_path(path: str) -> str:
    """The path itself. Raises JobFailed(invalid_spec) unless it is relative, plain ASCII and free of dot segments."""
    parts = PurePosixPath(path).parts
    plain = _OBJECT_PATH.fullmatch(path) and "/".join(parts) == path and not {"..", "."} & set(parts)
    if not plain or path.startswith("/"):
        raise JobFailed(
            ErrorCode.INVALID_SPEC,
            f"{path[:200]!r} is not a path inside a bucket",
            "use a relative path of ASCII letters, digits and . _ - without '#', '..' or a leading '/'",
        )
    return path


def sha256_of(file: Path) -> str:
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def dataset_absent(bucket: str, path: str) -> JobFailed:
    return JobFailed(
        ErrorCode.DATASET_UNREACHABLE,
        f"there is no dataset {bucket}/{path} in storage",
        "upload the dataset again, or check storage_bucket and storage_path of its row, and submit again",
    )


def upload_mismatch(name: str, size: int, sha256: str) -> JobDelayed:
    return JobDelayed(
        ErrorCode.UPLOAD_FAILED,
        f"{name} was stored, but reading it back did not give the file's {size:,} bytes with sha256 {sha256[:12]}…",
        "the next attempt uploads again; if this repeats, the storage itself damages files",
    )


async def _copy(source: Path, target: Path, *, into: HostPart = "storage folder") -> int:
    """Copy, return the size. Cancelled, it leaves nothing, and nothing appears later behind whoever cleans up."""
    given_up = threading.Event()
    copying = asyncio.ensure_future(asyncio.to_thread(_copy_atomically, source, target, into, given_up))
    try:
        return await asyncio.shield(copying)
    except asyncio.CancelledError:
        # No cancellation ends a thread.
        given_up.set()
        await asyncio.gather(copying, return_exceptions=True)
        raise


def _copy_atomically(source: Path, target: Path, into: HostPart, given_up: threading.Event) -> int:
    """Hidden at first, durable, then renamed: a reader sees the old file, none, or the whole."""
    hidden = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reading, hidden.open("wb") as writing:
            while (piece := reading.read(READ_BYTES)) and not given_up.is_set():
                writing.write(piece)
            if not given_up.is_set():
                writing.flush()
                os.fsync(writing.fileno())
            size = writing.tell()
        if given_up.is_set():
            hidden.unlink()
        else:
            hidden.replace(target)
        return size
    except OSError as error:
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise disk_fault(into, target.parent, error) from error


def _identity_of(root: Path) -> str:
    """The folder's own name, kept in it: hosts that mount it agree on it, whatever they and the path are called."""
    file = root / IDENTITY_FILE
    try:
        if not file.exists():
            root.mkdir(parents=True, exist_ok=True)
            hidden = file.with_name(f"{IDENTITY_FILE}.{os.getpid()}.part")
            hidden.write_text(f"{uuid4()}\n")
            hidden.replace(file)
        # Read back: somebody else may have named it in the same moment.
        return file.read_text().strip()
    except OSError as error:
        raise disk_fault("storage folder", root, error) from error


def open_storage(settings: Settings) -> Storage:
    """The storage that the settings name. The vendor's client is imported only where it is used."""
    if settings.effective_storage == "folder":
        return FolderStorage(settings.storage_dir, settings.models_bucket)
    from daemon.supabase_storage import SupabaseStorage

    assert settings.supabase_url is not None and settings.supabase_service_role_key is not None
    key = settings.supabase_service_role_key.get_secret_value()
    return SupabaseStorage(settings.supabase_url, key, settings.models_bucket)
