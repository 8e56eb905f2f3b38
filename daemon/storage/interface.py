"""The port to object storage: where datasets are read and adapters kept. The folder below is its plainest form.

Everything that an implementation promises is promised to the worker: an upload that returned is whole and
its hash was read back; one that was interrupted goes on where it stopped; nobody else's object is replaced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from daemon.errors import JobDelayed, JobFailed
from training.events import ErrorCode

# What Supabase Storage accepts as a key: ASCII without '#', '%' and backslash.
_OBJECT_PATH = re.compile(r"^[A-Za-z0-9!_.*'()&$@=;:+,?\- /]{1,900}$")


@dataclass(frozen=True)
class Location:
    """Which bucket, and of which storage: two projects, or two hosts' folders, may each have one of the same name."""

    storage: str
    bucket: str

    def parameters(self) -> dict[str, str]:
        return {"storage": self.storage, "bucket": self.bucket}


@dataclass(frozen=True)
class StoredObject:
    """An object that was read back: path inside its bucket, size, hash."""

    path: str
    bytes: int
    sha256: str


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
