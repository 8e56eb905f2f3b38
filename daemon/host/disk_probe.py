"""Tests a folder by writing a file: whether it works, how fast, and how much space is left."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4


@dataclass(frozen=True)
class DiskProbe:
    """The result: bytes written and synced, the seconds that took, and the bytes free afterwards."""

    written_bytes: int
    seconds: float
    free_bytes: int


def probe_disk(folder: Path, probe_bytes: int) -> DiskProbe:
    """Writes a file of whole MiB, syncs it, reads it back and deletes it. Raises OSError if one of these fails."""
    # Random data: a volume that compresses would seem too fast.
    block = os.urandom(2**20)
    probe = folder / f".probe-{uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    try:
        with probe.open("wb") as file:
            for _ in range(probe_bytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
        with probe.open("rb") as file:
            if any(file.read(len(block)) != block for _ in range(probe_bytes // len(block))):
                raise OSError(errno.EIO, "a file reads back otherwise than it was written")
    finally:
        probe.unlink(missing_ok=True)
    return DiskProbe(probe_bytes, seconds, shutil.disk_usage(folder).free)
