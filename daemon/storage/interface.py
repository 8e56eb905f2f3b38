"""The interface to object storage: where datasets are read and adapters kept. The simplest one is a folder.

Every implementation guarantees that an upload that returned is whole and its hash was read back, that
an interrupted one continues where it stopped, and that no other attempt's object is replaced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from daemon.errors import JobFailed, StorageAway
from training.events import ErrorCode

# The keys that Supabase Storage accepts: ASCII without '#', '%' and backslash.
_OBJECT_PATH = re.compile(r"^[A-Za-z0-9!_.*'()&$@=;:+,?\- /]{1,900}$")


@dataclass(frozen=True)
class Location:
    """A bucket and the storage it is in: two projects, or two hosts' folders, may have buckets of the same name."""

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
    """A dataset behind a URL that is secret and expires; ask for another one then."""

    url: str


@dataclass(frozen=True)
class LocalFile:
    """A dataset on this machine."""

    path: Path


DatasetSource = SignedUrl | LocalFile


class Storage(Protocol):
    """What the daemon needs from a storage. Paths are inside the bucket, POSIX, relative.

    Methods raise StorageAway or HostFault when another attempt may succeed, and JobFailed when it would not.
    """

    @property
    def bucket(self) -> str:
        """The bucket for adapters."""

    @property
    def location(self) -> Location:
        """Identifies that bucket in the same words on every host that sees it. May raise HostFault."""

    async def open_dataset(self, bucket: str, path: str) -> DatasetSource:
        """Returns where a dataset can be read now. Raises JobFailed(dataset_unreachable) when it does not exist."""

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        """Stores a file and reads it back. After an interruption, even a kill, it resumes from `resume_dir`."""

    async def verify(self, object_path: str, size: int, sha256: str) -> bool:
        """True if the stored object has this size and, read back, this hash; False if it is absent or different."""

    async def exists(self, object_path: str) -> bool:
        """True if the object exists."""

    async def download(self, object_path: str, to: Path) -> StoredObject:
        """Streams an object into a file, whole or not at all. Raises JobFailed when it is absent."""

    async def delete(self, object_path: str) -> None:
        """Deletes the object; an absent one is no error."""

    async def prove(self) -> None:
        """Raises HostFault, or StorageAway, if this host cannot work with the storage at all, whatever the job."""

    async def end_unfinished_uploads(self, folder: Path) -> None:
        """Deletes in the storage what uploads from this `resume_dir`, or a folder below it, left unfinished. No error
        if that is not possible now."""

    async def check(self, expected_bytes: int) -> str | None:
        """Checks before hours of training that the bucket exists (or creates it) and accepts a file of this size.

        Returns what could not be found out, in words for the operator; None if everything was."""

    async def close(self) -> None:
        """Closes connections."""


def safe_object_path(path: str) -> str:
    """Returns the path. Raises JobFailed(invalid_spec) unless it is relative, plain ASCII and free of dot segments."""
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


def object_absent(bucket: str, path: str) -> JobFailed:
    return JobFailed(
        ErrorCode.UPLOAD_FAILED,
        f"the object {bucket}/{path} is not in storage",
        "check that it was not deleted, and that this host uses the storage in which it was stored",
    )


def upload_mismatch(name: str, size: int, sha256: str) -> StorageAway:
    return StorageAway(
        ErrorCode.UPLOAD_FAILED,
        f"the object {name} was stored, but reading it back did not give the {size:,} bytes with sha256 "
        f"{sha256[:12]}… of the file",
        "the next attempt uploads again; if this repeats, the storage itself damages files",
    )
