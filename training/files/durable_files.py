"""Files that are whole or not there, and still there after the power went: hashed, written beside, renamed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# How much of a file is held at once where it is copied or read piece by piece.
READ_BYTES = 1024 * 1024


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex, read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when the file's content, or the folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
