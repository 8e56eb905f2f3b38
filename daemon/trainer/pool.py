"""A pool of pre-started trainer processes, one per slot, with their libraries imported and the last base model loaded.

A warm trainer keeps nothing of a job: it runs each job in a fork of itself (training/process/fork_server.py), which
the kernel cleans up completely. So jobs of different owners may use the same one, and no GPU memory is held between
jobs.
A trainer is ended after any outcome but success, when its memory has grown, when it has held a model for long without
being used, and when this host stops. A job that carries a key of its own, or needs several GPUs, gets a process of its
own: the trainers waiting in its slots are ended to free their memory, and new ones start there afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import structlog

from daemon.base_model.resolve import resolve_model
from daemon.chores import worked
from daemon.errors import HostFault, JobError
from daemon.host.inspect import Host
from daemon.queue.outcome import Failed
from daemon.settings import Settings, quantized_dir
from daemon.stop_request import Stop
from daemon.tasks import wait_at_most
from daemon.trainer.process import Timeouts, TrainerProcess
from daemon.trainer.verdict import Trained, Verdict
from training.events import ErrorCode, Event
from training.files.free_memory import free_bytes, total_bytes
from training.spec import HoldOrder, JobSpec

log = structlog.get_logger()

LOOK_SECONDS = 5.0
# Allowed growth since a trainer was first ready with the same model: nothing of a job should stay in its memory.
GROWTH_BYTES = 512 * 2**20
# Of the host's memory: with less to spare, an idle trainer gives its model back.
_LEAST_FREE = 0.05


@dataclass
class _IdleTrainer:
    """An idle trainer."""

    child: TrainerProcess
    since: float = field(default_factory=time.monotonic)


class TrainerPool:
    """Runs specs on this host, on idle trainers where there are any."""

    def __init__(self, settings: Settings, host: Host, command: tuple[str, ...]) -> None:
        self._settings = settings
        self._on_gpu = host.device == "cuda"
        self._device = host.device
        self._command = command
        # By slot, as CUDA_VISIBLE_DEVICES names them; none on a CPU host.
        self._cuda_names = {gpu.index: gpu.cuda_name for gpu in host.gpus} if self._on_gpu else {}
        slots = self._cuda_names or range(settings.slots or 1)
        self._slots = tuple(slots)
        self._keep_bytes = 0 if settings.warm != "model" else _memory_for_models(settings) // len(self._slots)
        self._waiting: dict[int, _IdleTrainer] = {}
        self._busy: set[int] = set()
        # Slots whose trainer died before it was ready: not tried again until a job has run there.
        self._unfit: set[int] = set()
        self._changed = asyncio.Event()
        self._closing = False

    async def run(
        self,
        spec: JobSpec,
        slots: tuple[int, ...],
        *,
        on_event: Callable[[Event], None],
        stop: Stop,
        patience: Timeouts,
        log_path: Path,
        own_environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Verdict:
        """Runs one spec on these slots. A trainer that stays idle afterwards keeps nothing of it."""

        async def run_on(child: TrainerProcess) -> Verdict:
            return await child.run(spec, on_event=on_event, stop=stop, patience=patience, log_path=log_path)

        slot = slots[0]
        may_stay = self._settings.warm != "off" and len(slots) == 1 and not own_environment and spec.num_gpus == 1
        self._busy.update(slots)
        try:
            if may_stay and (waiting := self._waiting.pop(slot, None)) is not None:
                verdict = await run_on(waiting.child)
                if not _was_lost(waiting.child, verdict, stop):
                    await self._put_back(slot, waiting.child)
                    return verdict
                # It died while idle, or before it began the job: run the job on another one.
                log.warning("warm_trainer_lost", slot=slot)
            await self._clear(slots)
            try:
                child = await TrainerProcess.start(
                    self._command,
                    gpus=self._gpus_of(slots),
                    work_dir=self._settings.work_dir,
                    own_environment=own_environment,
                    keep_bytes=self._keep_bytes if may_stay else None,
                )
            except OSError as error:
                raise HostFault(
                    "trainer",
                    ErrorCode.INTERNAL,
                    "The trainer cannot be started on the host.",
                    detail=f"the trainer cannot be started: {error.strerror or error}",
                ) from error
            verdict = await run_on(child)
            await self._put_back(slot, child)
            if isinstance(verdict, Failed) and _was_lost(child, verdict, stop):
                # A new process died before it read its spec: the job cannot be the cause.
                return replace(verdict, host="trainer")
            return verdict
        finally:
            self._busy.difference_update(slots)
            self._changed.set()

    def bases(self) -> list[str]:
        """Lists the base models loaded in idle trainers; an empty name stands for jobs that name none."""
        return self._named({base for slot in self._waiting if (base := self._held(slot)) is not None})

    def bases_after(self, ending: Iterable[str | None]) -> list[str]:
        """Returns what `bases` will return once jobs on these base models (None: the default one) have succeeded."""
        if self._settings.warm != "model" or self._on_gpu:
            return self.bases()
        return self._named({*self.bases(), *(base or self._settings.default_model for base in ending)})

    def preferred(self, free: Iterable[int], base_model: str | None) -> int | None:
        """Finds the free slot whose trainer holds this base model (None: the default one)."""
        wanted = base_model or self._settings.default_model
        return next((slot for slot in free if self._held(slot) == wanted), None)

    async def tend(self) -> None:
        """Keeps a trainer ready at each slot and ends those that were idle too long. Cancelled, it ends them all."""
        try:
            await self._fill()
            if self._settings.warm == "model" and self._settings.warm_default_model:
                await self._hold_default_model()
            while True:
                # Cleared before looking, so that a change meanwhile is not lost.
                self._changed.clear()
                await self._give_up_stale()
                await self._fill()
                worked()
                await wait_at_most(self._changed, LOOK_SECONDS)
        except asyncio.CancelledError:
            await self.close()
            raise

    def try_again(self) -> None:
        """Tries again to start trainers, after what prevented it was fixed."""
        self._unfit.clear()
        self._changed.set()

    def drain(self) -> None:
        """Ends the idle trainers: no more jobs will come."""
        self._closing = True
        self._changed.set()

    async def close(self) -> None:
        """Ends every idle trainer."""
        self._closing = True
        for slot in list(self._waiting):
            await self._waiting.pop(slot).child.kill()

    # -- idle trainers ---------------------------------------------------------------------------------------------

    async def _put_back(self, slot: int, child: TrainerProcess) -> None:
        if not child.is_done:
            return
        self._unfit.discard(slot)
        if self._closing:
            await child.kill()
        else:
            self._waiting[slot] = _IdleTrainer(child)

    def _gpus_of(self, slots: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self._cuda_names[slot] for slot in slots) if self._on_gpu else ()

    async def _clear(self, slots: tuple[int, ...]) -> None:
        """Ends the idle trainers of these slots, because the job needs their memory."""
        for slot in slots:
            if (waiting := self._waiting.pop(slot, None)) is not None:
                log.info("warm_trainer_given_up", slot=slot, reason="place_taken")
                await waiting.child.kill()

    async def _fill(self) -> None:
        for slot in self._slots:
            if self._settings.warm == "off" or slot in self._unfit or not self._may_wait(slot):
                continue
            try:
                child = await TrainerProcess.start(
                    self._command,
                    gpus=self._gpus_of((slot,)),
                    work_dir=self._settings.work_dir,
                    keep_bytes=self._keep_bytes,
                )
            except OSError as error:
                log.warning("warm_trainer_not_started", slot=slot, error=str(error))
                self._unfit.add(slot)
                continue
            if self._may_wait(slot):
                self._waiting[slot] = _IdleTrainer(child)
            else:
                # A job came meanwhile and started its own trainer.
                await child.kill()

    def _may_wait(self, slot: int) -> bool:
        return not self._closing and slot not in self._waiting and slot not in self._busy

    async def _give_up_stale(self) -> None:
        for slot, waiting in list(self._waiting.items()):
            reason = self._why_stale(waiting)
            if reason is None or self._waiting.get(slot) is not waiting:
                continue
            log.info("warm_trainer_given_up", slot=slot, reason=reason)
            del self._waiting[slot]
            if reason == "never_ready":
                self._unfit.add(slot)
            await waiting.child.kill()

    def _why_stale(self, waiting: _IdleTrainer) -> str | None:
        ready = waiting.child.ready
        if self._closing:
            return "closing"
        if not waiting.child.alive:
            return "never_ready" if ready is None else "died"
        if ready is None:
            return None
        if waiting.child.grown_bytes > GROWTH_BYTES:
            return "grown"
        if ready.base_model is None:
            return None
        if time.monotonic() - waiting.since > self._settings.warm_minutes * 60:
            return "idle"
        return "memory" if free_bytes() < _LEAST_FREE * total_bytes() else None

    async def _hold_default_model(self) -> None:
        """Loads the default model before a job asks for it, if it is on this host."""
        offline = self._settings.model_copy(update={"model_downloads": False})
        try:
            model = await resolve_model(None, offline)
        except (JobError, OSError) as error:
            log.warning("default_model_not_held", error=str(error))
            return
        order = HoldOrder(
            base_model=model.name,
            model_path=model.path,
            model_revision=model.revision,
            quantized_dir=quantized_dir(self._settings),
            device=self._device,
            compute_type=self._settings.asked_compute_type,
        )
        for waiting in self._waiting.values():
            waiting.child.give(order)

    def _named(self, bases: set[str]) -> list[str]:
        return sorted(bases | {""} if self._settings.default_model in bases else bases)

    def _held(self, slot: int) -> str | None:
        waiting = self._waiting.get(slot)
        if waiting is None or not waiting.child.alive or waiting.child.ready is None:
            return None
        return waiting.child.ready.base_model


def _was_lost(child: TrainerProcess, verdict: Verdict, stop: Stop) -> bool:
    """True if the process died, of itself or killed by another, before it reported anything about this job."""
    if not child.reported_nothing or stop.reason is not None or isinstance(verdict, Trained):
        return False
    return not (isinstance(verdict, Failed) and verdict.code is ErrorCode.STALLED)


def _memory_for_models(settings: Settings) -> int:
    if settings.warm_memory_gb is not None:
        return int(settings.warm_memory_gb * 2**30)
    return total_bytes() // 2
