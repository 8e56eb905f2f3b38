"""The trainer's process seen from outside: start it, read its events, end it, and say how it ended.

This module alone turns exit code, signal, last event and silence into a verdict; nobody else decides.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from daemon.job import Failed
from daemon.stop import Stop, StopReason
from daemon.trainer_log import TrainerLog
from training import events
from training.events import EXIT_STOPPED, ErrorCode, Event, parse_event
from training.spec import JobSpec

log = structlog.get_logger()

# Longest event line: a sample answer or a stack trace is far below it, a runaway line is cut off.
MAX_EVENT_BYTES = 4 * 1024 * 1024

# What the child inherits. Everything else stays behind, so that no secret can.
INHERITED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "CUDA_HOME",
    "CUDA_PATH",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TRITON_CACHE_DIR",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)


@dataclass(frozen=True)
class Trained:
    """The child saved an adapter and left in peace."""

    adapter_dir: Path
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stopped:
    """The child ended because we asked it to; `reason` says why we asked."""

    reason: StopReason


Verdict = Trained | Stopped | Failed


@dataclass(frozen=True)
class Patience:
    """How long the daemon waits, in seconds: for any event, for a checkpoint on stop, for an end after TERM."""

    stall_seconds: float = 1800.0
    drain_seconds: float = 60.0
    kill_seconds: float = 10.0

    def grace(self, reason: StopReason) -> float:
        """Seconds between TERM and KILL. Only a job that will go on elsewhere is worth waiting for a checkpoint."""
        worth_saving = {StopReason.SHUTDOWN, StopReason.DEADLINE, StopReason.BUDGET}
        return self.drain_seconds if reason in worth_saving else self.kill_seconds


async def run_child(
    spec: JobSpec,
    *,
    on_event: Callable[[Event], None],
    stop: Stop,
    patience: Patience,
    log_path: Path,
    gpus: tuple[int, ...] = (),
    command: tuple[str, ...] = (sys.executable, "-m", "training"),
) -> Verdict:
    """Run one spec in a process of its own until it ends, is stopped, or falls silent.

    `on_event` is called in order and must not block. No process of the child's group is alive on return.
    """
    read_end, write_end = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--events-fd",
            str(write_end),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(write_end,),
            start_new_session=True,
            env=child_environment(os.environ, gpus),
        )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)

    log.info("trainer_started", pid=process.pid)
    trainer_log = TrainerLog(log_path)
    last_words = _LastWords()
    reader = asyncio.create_task(_read_events(read_end, on_event, last_words))
    keeper = asyncio.create_task(_keep_log(process, trainer_log))
    try:
        await _hand_over(process, spec)
        stalled = await _watch(process, stop, patience, last_words)
    finally:
        # Also on cancellation of this task: never leave a process behind.
        _signal_group(process, signal.SIGKILL)
        await process.wait()
        # A grandchild that left the group could hold the pipes open for ever.
        await asyncio.wait({reader, keeper}, timeout=5.0)
        reader.cancel()
        keeper.cancel()
        await asyncio.gather(reader, keeper, return_exceptions=True)
        trainer_log.close()
    log.info("trainer_ended", pid=process.pid, returncode=process.returncode)
    assert process.returncode is not None
    return judge(
        process.returncode,
        last_words.terminal,
        stop_reason=stop.reason,
        stalled_seconds=patience.stall_seconds if stalled else None,
        log_tail=trainer_log.tail,
    )


def child_environment(environment: Mapping[str, str], gpus: tuple[int, ...]) -> dict[str, str]:
    """The child's whole environment: an allow-list, its cards, and a hub that is switched off."""
    kept = {name: environment[name] for name in INHERITED if name in environment}
    return kept | {
        "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in gpus),
        # NVML numbers the cards so; CUDA by default does not.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Fewer failed allocations near the card's limit (PyTorch's CUDA memory notes).
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def judge(
    returncode: int,
    terminal: events.AdapterSaved | events.Failed | None,
    *,
    stop_reason: StopReason | None,
    stalled_seconds: float | None,
    log_tail: str,
) -> Verdict:
    """Exit code, signal, last event and silence, turned into one verdict.

    Success needs both a saved adapter and a clean exit; a claim without the other is a failure.
    """
    if isinstance(terminal, events.AdapterSaved) and returncode == 0:
        return Trained(Path(terminal.path), terminal.summary)
    if stop_reason is not None:
        return Stopped(stop_reason)
    if stalled_seconds is not None:
        return Failed(
            ErrorCode.STALLED,
            f"The trainer said nothing for {stalled_seconds:.0f} s and was ended.",
            hint="It is tried again. If it happens at the same step every time, submit a smaller batch or sequence.",
            stack=log_tail,
            transient=True,
        )
    if isinstance(terminal, events.Failed):
        stack = "\n".join(part for part in (terminal.stack, log_tail) if part)
        return Failed(terminal.code, terminal.message, terminal.hint, stack, terminal.transient)
    if returncode == EXIT_STOPPED:
        # Somebody else sent it a TERM (the platform, an operator): as good as a release.
        return Stopped(StopReason.SHUTDOWN)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return Failed(
            ErrorCode.INTERNAL,
            f"The trainer was ended by {name}.",
            hint="SIGKILL is most often the host running out of memory: see the host's log. The job is tried again.",
            stack=log_tail,
            transient=True,
        )
    return Failed(
        ErrorCode.INTERNAL,
        f"The trainer ended with exit code {returncode} and without a word.",
        hint="This is a fault of the service, not of your job. The job is tried again.",
        stack=log_tail,
        transient=True,
    )


@dataclass
class _LastWords:
    terminal: events.AdapterSaved | events.Failed | None = None
    heard_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())


async def _hand_over(process: asyncio.subprocess.Process, spec: JobSpec) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(spec.model_dump_json().encode() + b"\n")
        await process.stdin.drain()
        process.stdin.close()
    except (BrokenPipeError, ConnectionResetError):
        return  # it died before it read; its exit code tells


async def _watch(process: asyncio.subprocess.Process, stop: Stop, patience: Patience, last_words: _LastWords) -> bool:
    """Wait for the child's end; ask for it when told to stop. True if it fell silent."""
    ended = asyncio.create_task(process.wait())
    asked = asyncio.create_task(stop.wait())
    clock = asyncio.get_running_loop().time
    try:
        while not ended.done():
            silence_left = last_words.heard_at + patience.stall_seconds - clock()
            await asyncio.wait({ended, asked}, timeout=max(silence_left, 0.0), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return False
            if asked.done():
                await _end(process, ended, stop, patience)
                return False
            if clock() - last_words.heard_at >= patience.stall_seconds:
                log.warning("trainer_stalled", silent_seconds=round(clock() - last_words.heard_at, 1))
                return True
        return False
    finally:
        asked.cancel()
        ended.cancel()


async def _end(process: asyncio.subprocess.Process, ended: asyncio.Task[int], stop: Stop, patience: Patience) -> None:
    """TERM the group, KILL it when its grace is over. A stronger reason that arrives meanwhile shortens the grace."""
    clock = asyncio.get_running_loop().time
    asked_at = clock()
    log.info("trainer_stopping", reason=stop.reason)
    _signal_group(process, signal.SIGTERM)
    while not ended.done():
        assert stop.reason is not None
        grace_left = asked_at + patience.grace(stop.reason) - clock()
        if grace_left <= 0 or stop.hurried:
            log.warning("trainer_killed", reason=stop.reason)
            _signal_group(process, signal.SIGKILL)
            await ended
            return
        await asyncio.wait({ended}, timeout=min(grace_left, 0.25))


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        # The child leads its own session, so its pid names the whole group, grandchildren included.
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


async def _read_events(read_end: int, on_event: Callable[[Event], None], last_words: _LastWords) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_EVENT_BYTES)
    pipe = os.fdopen(read_end, "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # longer than any event we know
                log.warning("event_too_long", limit_bytes=MAX_EVENT_BYTES)
                continue
            if not line:
                return
            last_words.heard_at = loop.time()
            event = parse_event(line)
            if event is None:
                log.warning("event_not_understood", line=line[:200].decode(errors="replace"))
                continue
            if isinstance(event, events.AdapterSaved | events.Failed):
                last_words.terminal = event
            on_event(event)
    finally:
        transport.close()


async def _keep_log(process: asyncio.subprocess.Process, trainer_log: TrainerLog) -> None:
    assert process.stdout is not None
    while chunk := await process.stdout.read(65536):
        trainer_log.write(chunk)
