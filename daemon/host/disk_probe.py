"""Whether a folder takes files, how fast, and how much more of them: found by writing one."""

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
    """What a folder did: bytes written and synced in so many seconds, and bytes free after that."""

    written_bytes: int
    seconds: float
    free_bytes: int


def probe_disk(folder: Path, probe_bytes: int) -> DiskProbe:
    """Write a file of whole MiB, sync it, read it back and delete it. Raises OSError where one of these fails."""
    # Random, for a volume that compresses would be measured too fast.
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
