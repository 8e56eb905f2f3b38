"""Files that are whole or not there: hashed, written beside their place, renamed."""

from __future__ import annotations

import hashlib
from pathlib import Path

READ_BYTES = 1024 * 1024


def sha256_of(file: Path) -> str:
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
