"""Writes files that are complete or absent, even after a power cut: written to a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# How much of a file is in memory at once while it is copied or read.
READ_BYTES = 1024 * 1024

# Errors of volumes that cannot sync a folder, such as some network volumes; PostgreSQL ignores the same two.
_FOLDER_CANNOT_BE_SYNCED = (errno.EBADF, errno.EINVAL)


def sha256_of(path: Path) -> str:
    """Returns the file's SHA-256 in hex, read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns once the file's content, or the folder's entries, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _FOLDER_CANNOT_BE_SYNCED):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def beside(final: Path) -> Iterator[Path]:
    """A hidden path in the folder of `final` to write to before `put_in_place`. Anything left there is removed."""
    hidden = final.with_name(f".{final.name}.{os.getpid()}.part")
    _remove(hidden)
    try:
        yield hidden
    finally:
        _remove(hidden)


def put_in_place(written: Path, final: Path) -> None:
    """Gives a file or folder its final name. A reader sees either the old or all of the new, even after a power cut:
    contents are on disk before the rename, and the rename is on disk before this returns. Raises OSError.

    An existing file is replaced. An existing folder is removed just before the rename, which cannot replace one."""
    for path in written.rglob("*") if written.is_dir() else ():
        sync(path)
    sync(written)
    if written.is_dir():
        shutil.rmtree(final, ignore_errors=True)
    written.replace(final)
    sync(final.parent)


def write_whole(file: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a small file so that it is complete at every moment. Raises OSError."""
    with beside(file) as hidden:
        hidden.touch(mode)
        hidden.write_text(text, encoding="utf-8")
        put_in_place(hidden, file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
