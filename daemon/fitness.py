"""Whether this host can work at all: its broken parts, and the probes that find them repaired.

A host with a fault claims nothing (daemon.worker), says so in its row, and is probed until the broken part works again.
A probe does what a job does: it writes and syncs a file, asks the storage, starts a trainer, computes on the GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, assert_never

import structlog

from daemon.errors import JobError
from daemon.host.disk_probe import probe_disk
from daemon.host.gpus import find_gpus
from daemon.host.inspect import Host
from daemon.sentence import as_sentence
from daemon.settings import Settings
from daemon.storage.interface import Storage
from daemon.storage.try_out import try_out
from daemon.trainer.process import TrainerProcess
from daemon.trainer.run_selfcheck import run_selfcheck
from daemon.troubles import Troubles
from training.events import HostPart

log = structlog.get_logger()

FIRST_PAUSE_SECONDS = 1.0
# A repaired volume is found within a minute; each probe writes a few megabytes or imports the libraries once.
LONGEST_PAUSE_SECONDS = 60.0
PROBE_BYTES = 4 * 2**20
# Less than the smallest checkpoint of a 7 B model at rank 16 with its optimizer: no training can finish with less.
MIN_FREE_BYTES = 256 * 2**20
# Importing torch, transformers, peft and trl takes 5 s from a warm page cache and a minute from a cold network volume.
START_SECONDS = 180.0
# Storage that does not answer for this long at the start is away: nothing is claimed until it answers.
ANSWER_SECONDS = 10.0
# Longer than the tries of one request, so that the reason is told.
TRY_OUT_SECONDS = 60.0


class Fitness:
    """The broken parts of this host. `on_mended` is called when the last of them works again."""

    def __init__(
        self, settings: Settings, host: Host, command: tuple[str, ...], troubles: Troubles, storage: Storage
    ) -> None:
        self._settings = settings
        self._host = host
        self._command = command
        self._troubles = troubles
        self._storage = storage
        self._broken: dict[HostPart, str] = {}
        self._changed = asyncio.Event()
        self.on_mended: Callable[[], None] = lambda: None

    @property
    def fit(self) -> bool:
        return not self._broken

    @property
    def storage_part(self) -> HostPart:
        """The part that stores adapters."""
        return "storage folder" if self._settings.effective_storage == "folder" else "storage"

    def report(self, part: HostPart, detail: str) -> None:
        """Marks a part as broken: nothing is claimed until a probe passes. `detail` is for the operator."""
        self._broken[part] = detail
        self._troubles.begin(
            part, f"{as_sentence(detail)} {ADVICE[part]}; this host claims nothing until a probe of it passes"
        )
        self._changed.set()

    async def look(self) -> None:
        """Checks before the first claim that the disks can be written and the storage takes our key."""
        parts: list[HostPart] = ["work folder", self.storage_part]
        for part in parts:
            # Storage is not tried out as after a fault: that would delay the first claim.
            asking = _answer_of(self._storage.prove(), ANSWER_SECONDS) if part == "storage" else self.probe(part)
            if (fault := await asking) is not None:
                self.report(part, fault)

    async def run(self) -> None:
        """Probes what is broken until it works, forever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._until_mended()

    async def _until_mended(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while self._broken:
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            for part in list(self._broken):
                fault = await self.probe(part)
                if fault is not None:
                    self.report(part, fault)
                elif self._broken.pop(part, None) is not None:
                    self._troubles.end(part)
        log.info("host_mended")
        self.on_mended()

    async def probe(self, part: HostPart) -> str | None:
        """Returns what is wrong with this part, or None if it works."""
        match part:
            case "work folder":
                return await asyncio.to_thread(probe_folder, self._settings.work_dir)
            case "models folder":
                return await asyncio.to_thread(probe_folder, self._settings.models_dir)
            case "storage folder":
                return await asyncio.to_thread(probe_folder, self._settings.storage_dir)
            case "storage":
                return await _answer_of(try_out(self._storage, self._host.worker_id), TRY_OUT_SECONDS)
            case "trainer":
                return await self._probe_trainer()
            case "GPU":
                return await self._probe_gpu()
            case _:
                assert_never(part)

    async def _probe_trainer(self) -> str | None:
        """Starts a trainer as the pool does: it reports that it is ready once the libraries are imported."""
        try:
            child = await TrainerProcess.start(self._command, keep_bytes=0)
        except OSError as error:
            return f"the trainer cannot be started: {error.strerror or error}"
        try:
            await asyncio.wait_for(child.first_word(), START_SECONDS)
            if child.ready is not None:
                return None
            return f"the trainer ended with exit code {child.returncode} before it was ready; its output is in the log"
        except TimeoutError:
            return f"the trainer was not ready within {START_SECONDS:.0f} s"
        finally:
            await child.kill()

    async def _probe_gpu(self) -> str | None:
        seen = len(await asyncio.to_thread(find_gpus))
        if seen < len(self._host.gpus):
            return f"{seen} of {len(self._host.gpus)} GPUs answer"
        for gpu in self._host.gpus:
            try:
                fault = (await run_selfcheck("cuda", (gpu.cuda_name,), START_SECONDS)).fault
            except TimeoutError:
                return f"GPU {gpu.index} did not answer within {START_SECONDS:.0f} s"
            if fault is not None:
                return f"GPU {gpu.index}: {fault[:300]}"
        return None


ADVICE: dict[HostPart, str] = {
    "work folder": "Mount the volume, free space on it, or set TRAINER_WORK_DIR to a writable folder",
    "models folder": "Mount the volume, free space on it, or set TRAINER_MODELS_DIR to a larger disk",
    "storage folder": "Free space, or set TRAINER_STORAGE_DIR to a folder that the daemon may write",
    "storage": "If the storage is away, wait; else set SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY to the URL and the "
    "service_role (or sb_secret_) key of one project; `brightrun-trainer doctor` shows what is wrong",
    "trainer": "Install the libraries with constraints.txt; `brightrun-trainer doctor` shows what is wrong",
    "GPU": "Look at nvidia-smi and dmesg for Xid errors; the pod may have to be replaced",
}


async def _answer_of(asking: Coroutine[Any, Any, None], seconds: float) -> str | None:
    """Returns what is wrong with the storage, or None."""
    try:
        await asyncio.wait_for(asking, seconds)
    except JobError as error:
        return error.for_the_operator
    except TimeoutError:
        return f"the storage did not answer within {seconds:.0f} s"
    return None


def probe_folder(folder: Path) -> str | None:
    """Returns what is wrong with a folder that must be writable, or None."""
    try:
        free = probe_disk(folder, PROBE_BYTES).free_bytes
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    if free < MIN_FREE_BYTES:
        return f"{folder}: {free / 2**20:.0f} MiB are free, at least {MIN_FREE_BYTES / 2**20:.0f} are needed"
    return None
