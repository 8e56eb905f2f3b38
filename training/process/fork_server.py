"""The fork server: holds the libraries and one base model, and forks itself for each job.

Everything that a job reads, computes and writes exists only in its fork. The fork reads the spec from stdin, byte by
byte; dataset, adapter, gradients, seeds, patched modules, environment and traceback are the fork's; and the kernel
frees all of it when the fork ends. So the next job finds what loading left, by construction and not by cleaning up; an
adapter is the same, bit for bit, as from a separate process, and jobs of different owners may follow each other. A fork
tells this process only which base model should be in memory (`training.base.loaded_model.Base`) and how it ended.

A fork shares the model's memory until it writes to it, and nothing writes to frozen weights. A fork works only if this
process has no OpenMP thread pool and no CUDA context. So this process computes on one thread, holds a model for a card
in the host's memory, and a fork that cannot open the GPU replaces itself by `exec` and runs its job cold.

    ready -> a line comes -> fork: read, check the data -> (change the base model here -> fork:) train -> reap -> ready

Any result of a fork other than success ends this process in the same way, with the same status or signal.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from training.base.loaded_model import Base, HeldBase, load_base, may_be_held
from training.event_writer import EventWriter
from training.events import EXIT_STOPPED, Ready, Stage
from training.files.page_cache import read_ahead
from training.parent_process import adopt_orphans, die_with_parent, end_every_child
from training.preflight.estimate import model_bytes
from training.process.cuda_check import _card_opens, _card_unopened
from training.process.fork_io import (
    _STDIN,
    ForkMessage,
    ForkResult,
    _memory_file,
    _parse_message,
    _parse_order,
    _read_line,
    _reopened,
    _resident_bytes,
    _return_memory,
    _wait_for_input,
    _write_all,
)
from training.process.run_job import begin_job, read_spec, status_of
from training.quick_imports import quick_imports
from training.spec import HoldOrder, JobSpec
from training.stop_switch import StopSwitch

if TYPE_CHECKING:
    from training.recipe import Prepared


class ForkServer:
    """Serves lines of stdin until it ends, a job fails, or SIGTERM comes."""

    def __init__(self, events_fd: int, keep_bytes: int) -> None:
        self._events_fd = events_fd
        self._keep_bytes = keep_bytes
        self._held: HeldBase | None = None
        self._served = 0
        self._threads = 1
        self._fork: int | None = None
        self._stopping = False

    def serve(self) -> int:
        """Returns the exit status. Does not return if a signal ended a fork: this process ends by the same signal."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        adopt_orphans()
        self._threads = _import_libraries()
        while not self._stopping:
            self._say_ready()
            _wait_for_input()
            ending = self._serve_line()
            if ending.status != 0:
                return _end_like(ending.status)
            if ending.message is not None and ending.message.kind == "nothing_more":
                return 0
            self._served += 1
        return 0

    def _serve_line(self) -> ForkResult:
        with _memory_file() as desk:
            ending = self._in_a_fork(lambda say: self._begin(say, desk))
            message = ending.message
            if ending.status != 0 or message is None or message.kind == "nothing_more":
                return ending
            if self._stopping:
                # The stop came too late for this fork to handle, and the next one would not know of it.
                return ForkResult(EXIT_STOPPED << 8, None)
            failure = self._hold(message.base)
            if message.kind == "hold":
                return ForkResult(0 if failure is None else 1 << 8, None)
            return self._in_a_fork(lambda _say: self._go_on(desk, failure))

    # -- here ----------------------------------------------------------------------------------------------------------

    def _hold(self, base: Base | None) -> Exception | None:
        """Replaces the base model that is held by this one, or by none. Returns the error if it cannot be loaded."""
        self._held = None
        _return_memory()
        if base is None:
            return None
        try:
            self._held = load_base(base)
        except Exception as error:  # noqa: BLE001 - a fork turns it into the job's `failed` event
            return error
        # The garbage collector would write to the head of every object that the forks share.
        _return_memory()
        gc.freeze()
        return None

    def _say_ready(self) -> None:
        ready = Ready(
            served=self._served,
            base_model=None if self._held is None else self._held.base.base_model,
            resident_bytes=_resident_bytes(),
        )
        try:
            os.write(self._events_fd, ready.model_dump_json().encode() + b"\n")
        except BrokenPipeError:
            sys.exit(1)

    def _in_a_fork(self, work: Callable[[Callable[[ForkMessage], None]], int]) -> ForkResult:
        """Runs `work` in a child process; returns when it and everything that it started have ended."""
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with _memory_file() as note:
            # Block SIGTERM until both processes know which one they are.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            self._fork = os.fork()
            if self._fork == 0:
                _end_as(lambda: self._as_a_fork(parent, note, work))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            _, status = os.waitpid(self._fork, 0)
            self._fork = None
            end_every_child()
            with _reopened(note) as file:
                return ForkResult(status, _parse_message(file.read()))

    def _on_sigterm(self, _number: int, _frame: object) -> None:
        self._stopping = True
        if self._fork is None:
            raise SystemExit(EXIT_STOPPED)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._fork, signal.SIGTERM)

    # -- in the fork ---------------------------------------------------------------------------------------------------

    def _as_a_fork(self, parent: int, note: int, work: Callable[[Callable[[ForkMessage], None]], int]) -> int:
        import torch

        self._stop = StopSwitch()
        self._stop.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        die_with_parent(parent)
        torch.set_num_threads(self._threads)
        return work(lambda message: _write_all(note, message.model_dump_json().encode()))

    def _begin(self, say: Callable[[ForkMessage], None], desk: int) -> int:
        """The first fork: reads the line; runs the job if the right base model is held, else has it loaded."""
        line = _read_line()
        if not line.strip():
            say(ForkMessage(kind="nothing_more"))
            return 0
        if (order := _parse_order(line)) is not None:
            return self._consider(order, say)
        spec = read_spec(line, self._events_fd)
        if spec is None:
            return 1
        # Ranks are started by an engine with its own threads and store, which do not work in a fork.
        if spec.num_gpus > 1 or not _card_opens(spec):
            _start_afresh(line, self._events_fd)
        voice = EventWriter(self._events_fd, spec.job_id)
        begin_job(spec, voice)

        def work() -> None:
            from training.base.load import load_base_model
            from training.recipe import prepare, train_on

            base = Base.of(spec) if spec.model_path.is_dir() else None
            held = self._held if self._held is not None and self._held.base == base else None
            if held is None:
                read_ahead(spec)
            prepared = prepare(spec, voice, None if held is None else held.tokenizer)
            voice.stage(Stage.LOADING, spec.base_model)
            if held is not None:
                train_on(held.on_its_device(), prepared, spec, voice, self._stop)
            elif (kept := self._worth_keeping(base, prepared)) is not None or self._held is not None:
                _write_all(desk, pickle.dumps((spec, prepared)))
                say(ForkMessage(kind="go_on", base=kept))
            else:
                train_on(load_base_model(spec, prepared.folder, voice), prepared, spec, voice, self._stop)

        return status_of(work, spec, voice)

    def _worth_keeping(self, base: Base | None, prepared: Prepared) -> Base | None:
        if base is None or not may_be_held(base, prepared.folder, prepared.estimate.model_bytes, self._keep_bytes):
            return None
        return base

    def _consider(self, order: HoldOrder, say: Callable[[ForkMessage], None]) -> int:
        """Has a base model loaded before any job has asked for it, if it may stay in memory."""
        base = Base.of(order)
        folder = base.open()
        needed = model_bytes(folder, quantize=order.quantize, compute_type=base.compute_type)
        if may_be_held(base, folder, needed, self._keep_bytes):
            say(ForkMessage(kind="hold", base=base))
        return 0

    def _go_on(self, desk: int, failure: Exception | None) -> int:
        """The second fork: continues what the first has prepared, on the base model that was loaded in between."""
        from training.base.load import load_base_model
        from training.recipe import train_on

        spec: JobSpec
        prepared: Prepared
        with _reopened(desk) as file:
            # Written by our own first fork into anonymous memory.
            spec, prepared = pickle.load(file)  # noqa: S301
        # Otherwise it would stay in memory for the whole training.
        os.ftruncate(desk, 0)
        voice = EventWriter(self._events_fd, spec.job_id)

        def work() -> None:
            if failure is not None:
                raise failure
            if self._held is None:
                train_on(load_base_model(spec, prepared.folder, voice), prepared, spec, voice, self._stop)
                return
            for remark in self._held.remarks:
                voice.say(remark.model_copy(update={"job_id": spec.job_id}))
            train_on(self._held.on_its_device(), prepared, spec, voice, self._stop)

        return status_of(work, spec, voice)


def _import_libraries() -> int:
    """Imports everything that a job needs and stays on one thread. Returns how many threads a job would have had."""
    with quick_imports(), _card_unopened():
        # What the chart imports at a job's end, then everything else.
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import torch

        import training.recipe  # noqa: F401

    threads = torch.get_num_threads()
    # A fork of a process with an OpenMP thread pool waits for ever for threads that it does not have.
    torch.set_num_threads(1)
    return int(threads)


def _start_afresh(line: str, events_fd: int) -> None:
    """Becomes a new process, with the same pid and pipes, that runs this one job cold. Does not return."""
    stdin = os.memfd_create("spec", 0)
    _write_all(stdin, line.encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, _STDIN)
    os.set_inheritable(events_fd, True)
    # A signal mask outlives exec.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.execv(sys.executable, [sys.executable, "-m", "training", "--events-fd", str(events_fd)])  # noqa: S606


def _end_as(work: Callable[[], int]) -> None:
    """Ends this process with the status of `work`, whatever happens: its stack frames belong to the fork server."""
    status = 1
    try:
        try:
            status = work()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - it must not reach the caller's frames
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _end_like(status: int) -> int:
    """The exit status for a wait status; if a signal ended the fork, ends this process by the same signal."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pause()
    raise AssertionError("unreachable")
