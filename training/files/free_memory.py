"""Memory of this host, or of the container's cgroup, and how much of it is free."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Memory in bytes of a GPU, or of the host: all of it, and what no other process holds."""

    total_bytes: int
    free_bytes: int

    @classmethod
    def all_free(cls, total_bytes: int) -> Memory:
        return cls(total_bytes, total_bytes)

    def times(self, count: int) -> Memory:
        return Memory(self.total_bytes * count, self.free_bytes * count)

    def shared_by(self, count: int) -> Memory:
        return Memory(self.total_bytes // count, self.free_bytes // count)


def free_bytes() -> int:
    """Returns the memory available without swapping or being killed; the page cache counts as free."""
    free = 1024 * _number("/proc/meminfo", "MemAvailable:")
    # No limit, or another version of cgroups: use the host's memory.
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        free = min(free, limit - used + _number(_CGROUP / "memory.stat", "inactive_file"))
    return free


def total_bytes() -> int:
    """Returns the memory of this host, or the container's limit if that is less."""
    total = 1024 * _number("/proc/meminfo", "MemTotal:")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int((_CGROUP / "memory.max").read_text(encoding="ascii")))
    return total


def _number(file: Path | str, name: str) -> int:
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
