"""The slots of this host: one per GPU, or as many as the settings say."""

from __future__ import annotations

from daemon.host.inspect import Host


class GpuSlots:
    """Tracks which slots of this host are free: GPUs on a GPU host, numbered slots on a CPU host."""

    def __init__(self, host: Host, most_jobs: int | None) -> None:
        self._on_cpu = host.device == "cpu"
        self._gpus_per_job = host.gpus_per_job
        slots = range(most_jobs or 1) if self._on_cpu else [gpu.index for gpu in host.gpus]
        self._free = list(slots)
        self._jobs_left = most_jobs or len(self._free)

    @property
    def free_gpus(self) -> int | None:
        """How many GPUs a claimed job may ask for. None (no limit) on a CPU host, which has no GPUs."""
        return None if self._on_cpu else min(len(self._free), self._gpus_per_job)

    @property
    def has_room(self) -> bool:
        return bool(self._free) and self._jobs_left > 0

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(self._free)

    def take(self, count: int, preferred: int | None = None) -> tuple[int, ...]:
        """Takes slots for one job. A CPU host, which may claim any job, gives as many as it has."""
        count = min(count, len(self._free)) if self._on_cpu else count
        taken = (preferred,) if count == 1 and preferred in self._free else tuple(self._free[:count])
        self._free = [slot for slot in self._free if slot not in taken]
        self._jobs_left -= 1
        return taken

    def give_back(self, slots: tuple[int, ...]) -> None:
        self._free = sorted([*self._free, *slots])
        self._jobs_left += 1
