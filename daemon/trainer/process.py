"""The trainer's process, seen from outside: starts it, reads its events, ends it, and returns how it ended.

How exit code, signal, last event and silence become a verdict is in daemon.trainer.verdict.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import termios
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import structlog

from daemon.stop_request import Stop, StopReason
from daemon.trainer.environment import child_environment
from daemon.trainer.log_file import TrainerLog
from daemon.trainer.verdict import Verdict, verdict_of
from training import events
from training.events import Event, Ready, parse_line
from training.spec import HoldOrder, JobSpec

log = structlog.get_logger()

# The longest event line: a sample answer or a stack trace is far shorter, a runaway line is skipped.
MAX_EVENT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Timeouts:
    """How long the daemon waits, in seconds: for any event, for a checkpoint on stop, for the exit after SIGTERM."""

    stall_seconds: float = 1800.0
    drain_seconds: float = 60.0
    kill_seconds: float = 10.0

    def grace(self, reason: StopReason) -> float:
        """Seconds between SIGTERM and SIGKILL."""
        return self.drain_seconds if reason.saves_a_checkpoint else self.kill_seconds


class TrainerProcess:
    """One trainer process and the pipes to it.

    A warm one takes one spec after another as long as each succeeds; after any other outcome it is ended.
    """

    def __init__(self, process: asyncio.subprocess.Process, *, warm: bool, output: _ProcessOutput) -> None:
        self._process = process
        self._warm = warm
        self._output = output
        self._given = 0
        self._done = asyncio.Event()
        self._on_event: Callable[[Event], None] = _drop
        self._last_words = _LastEvent()
        self._reader: asyncio.Task[None] | None = None
        self.ready: Ready | None = None
        # Resident bytes when it was first ready with a base model, by that model's name.
        self._sizes: dict[str | None, int] = {}

    @classmethod
    async def start(
        cls,
        command: tuple[str, ...],
        *,
        gpus: Sequence[str] = (),
        work_dir: Path | None = None,
        own_environment: Mapping[str, str] = MappingProxyType({}),
        keep_bytes: int | None = None,
    ) -> TrainerProcess:
        """Starts a process. With `keep_bytes` it is warm, and keeps a base model up to this size in memory.

        `gpus` are names for CUDA_VISIBLE_DEVICES; compiled kernels are kept in `work_dir`. `own_environment` is for one
        job only: a tracker's key.
        """
        warm = () if keep_bytes is None else ("--warm", "--keep-bytes", str(keep_bytes))
        events_read, events_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--events-fd",
                str(events_write),
                *warm,
                stdin=asyncio.subprocess.PIPE,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(events_write,),
                start_new_session=True,
                env=child_environment(os.environ, gpus, work_dir) | dict(own_environment),
            )
        except BaseException:
            os.close(events_read)
            os.close(output_read)
            raise
        finally:
            os.close(events_write)
            os.close(output_write)
        child = cls(process, warm=keep_bytes is not None, output=_ProcessOutput(output_read))
        child._reader = asyncio.create_task(child._read_events(events_read))
        try:
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: child._output, os.fdopen(output_read, "rb", buffering=0)
            )
        except BaseException:
            await child.kill()
            raise
        log.info("trainer_started", pid=process.pid)
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def first_word(self) -> None:
        """Returns when a warm one is ready for its first line, or has ended."""
        ended, ready = asyncio.create_task(self._process.wait()), asyncio.create_task(self._done.wait())
        try:
            await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            ready.cancel()

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def is_done(self) -> bool:
        """Every line it was given is finished, and the next one may come."""
        return self.alive and self.ready is not None and self.ready.served == self._given

    @property
    def grown_bytes(self) -> int:
        """How much it has grown since it was first ready with the same base model."""
        return 0 if self.ready is None else self.ready.resident_bytes - self._sizes[self.ready.base_model]

    @property
    def reported_nothing(self) -> bool:
        """True if no event of the last spec arrived: whatever became of the process, that job never began."""
        return self._last_words.silent

    async def run(
        self,
        spec: JobSpec,
        *,
        on_event: Callable[[Event], None],
        stop: Stop,
        patience: Timeouts,
        log_path: Path,
    ) -> Verdict:
        """Hands over a spec and waits for the outcome. On return the process is done with it, or its group is dead.

        `on_event` is called in order and must not block.
        """
        trainer_log = TrainerLog(log_path)
        self._output.log, self._on_event, self._last_words = trainer_log, on_event, _LastEvent()
        done = False
        try:
            self.give(spec)
            log.info("trainer_told", pid=self.pid)
            stalled = await self._watch(stop, patience)
            done = self.is_done
            if done:
                # The job's process has ended, so all its output is in the pipe; the next job has another log.
                await self._output.drained()
                log.info("trainer_waits", pid=self.pid, served=self._given)
        finally:
            if not done:
                # Also when this task is cancelled: never leave a process behind.
                await self.kill()
            self._output.log, self._on_event = None, _drop
            trainer_log.close()
        returncode = 0 if done else self._process.returncode
        assert returncode is not None
        return verdict_of(
            returncode,
            self._last_words.terminal,
            stop_reason=stop.reason,
            stalled_seconds=patience.stall_seconds if stalled else None,
            log_tail=trainer_log.tail,
        )

    def give(self, line: JobSpec | HoldOrder) -> None:
        """Writes one line to its stdin. A process that is not warm gets only one."""
        stdin = self._process.stdin
        assert stdin is not None
        self._given += 1
        self._done.clear()
        if stdin.is_closing():
            return  # it died before this; its exit code says why
        # Not drained: a process that does not read would block us, and we would miss a stop request and its silence.
        stdin.write(line.model_dump_json().encode() + b"\n")
        if not self._warm:
            stdin.close()

    async def kill(self) -> None:
        """Kills the process and its whole group. None of it is alive on return."""
        _signal_group(self._process, signal.SIGKILL)
        await self._process.wait()
        assert self._reader is not None
        # A grandchild that left the group could hold the pipes open forever.
        await asyncio.wait({self._reader, asyncio.ensure_future(self._output.closed)}, timeout=5.0)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._output.close()
        log.info("trainer_ended", pid=self._process.pid, returncode=self._process.returncode)

    async def _watch(self, stop: Stop, patience: Timeouts) -> bool:
        """Waits until it is done or gone; ends it on a stop request. Returns True if it went silent."""
        ended = asyncio.create_task(self._process.wait())
        done = asyncio.create_task(self._done.wait())
        asked = asyncio.create_task(stop.wait())
        clock = asyncio.get_running_loop().time
        try:
            while not ended.done() and not done.done():
                silence_left = self._last_words.heard_at + patience.stall_seconds - clock()
                await asyncio.wait(
                    {ended, done, asked}, timeout=max(silence_left, 0.0), return_when=asyncio.FIRST_COMPLETED
                )
                if ended.done() or done.done():
                    return False
                if asked.done():
                    await _end(self._process, ended, stop, patience)
                    return False
                if clock() - self._last_words.heard_at >= patience.stall_seconds:
                    silent_seconds = round(clock() - self._last_words.heard_at, 1)
                    log.warning("trainer_stalled", silent_seconds=silent_seconds)
                    return True
            return False
        finally:
            for task in (ended, done, asked):
                task.cancel()

    async def _read_events(self, read_end: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_EVENT_BYTES)
        pipe = os.fdopen(read_end, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while True:
                try:
                    line = await reader.readline()
                except ValueError:  # longer than any known event
                    log.warning("event_too_long", limit_bytes=MAX_EVENT_BYTES)
                    continue
                if not line:
                    return
                try:
                    self._hear(line)
                except Exception:  # a handler failed: later events, the final one included, must still arrive
                    log.exception("event_not_taken", line=line[:200].decode(errors="replace"))
        finally:
            transport.close()

    def _hear(self, line: bytes) -> None:
        event = parse_line(line)
        self._last_words.heard_at = asyncio.get_running_loop().time()
        if event is None:
            log.warning("event_not_understood", line=line[:200].decode(errors="replace"))
            return
        if isinstance(event, Ready):
            self.ready = event
            self._sizes.setdefault(event.base_model, event.resident_bytes)
            if event.served == self._given:
                self._done.set()
            return
        self._last_words.silent = False
        if isinstance(event, events.AdapterSaved | events.RunFailed):
            self._last_words.terminal = event
        self._on_event(event)


@dataclass
class _LastEvent:
    """What has arrived for the current spec."""

    terminal: events.AdapterSaved | events.RunFailed | None = None
    silent: bool = True
    heard_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class _ProcessOutput(asyncio.Protocol):
    """Writes what the process prints into the current job's log; between two jobs, into the daemon's debug log."""

    def __init__(self, read_end: int) -> None:
        self.log: TrainerLog | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Not read from the transport: RunPod's test server runs on uvloop, whose transports do not expose it.
        self._read_end = read_end
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self.log is not None:
            self.log.write(data)
        else:
            log.debug("trainer_printed", text=data[-2000:].decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the library's signature
        if not self.closed.done():
            self.closed.set_result(None)

    async def drained(self) -> None:
        """Returns when nothing that was printed so far is left in the pipe."""
        while not self.closed.done() and self._waiting_bytes():  # noqa: ASYNC110 - a pipe does not signal that it is empty
            await asyncio.sleep(0)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _waiting_bytes(self) -> int:
        answer = array("i", [0])
        fcntl.ioctl(self._read_end, termios.FIONREAD, answer)
        return answer[0]


def _drop(event: Event) -> None:
    log.warning("event_of_no_job", kind=event.kind)


async def _end(process: asyncio.subprocess.Process, ended: asyncio.Task[int], stop: Stop, patience: Timeouts) -> None:
    """Sends SIGTERM to the group, and SIGKILL after the grace period. A stronger stop reason shortens the grace."""
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
