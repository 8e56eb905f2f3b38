"""Free memory of this host, or of the container's cgroup."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


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
