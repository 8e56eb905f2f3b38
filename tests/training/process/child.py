"""The trainer as the daemon starts it: a real process, a spec on stdin, events on a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tests.forked_process import ForkedProcess, forker
from tests.paths import ROOT, TRAINER_PYTHON
from training.events import Event, Ready, parse_line
from training.spec import JobSpec

# Jobs one after another, each in a fork; models of up to a gigabyte stay in memory.
WARM = ("--warm", "--keep-bytes", "1000000000")


class Child:
    """One running trainer. A thread reads its events; waiting uses a condition with a deadline."""

    def __init__(self, process: subprocess.Popen[bytes] | ForkedProcess, stdin: BinaryIO, events_fd: int) -> None:
        self.process = process
        self._stdin = stdin
        self.events: list[Event] = []
        self.readies: list[Ready] = []
        self._changed = threading.Condition()
        self._ended = False
        self._deaf = False
        self._reader = threading.Thread(target=self._read, args=(events_fd,), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as pipe:
            for line in pipe:
                if self._deaf:
                    break
                event = parse_line(line)
                assert event is not None, line
                with self._changed:
                    if isinstance(event, Ready):
                        self.readies.append(event)
                    else:
                        self.events.append(event)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def send(self, line: str) -> None:
        self._stdin.write(line.encode() + b"\n")
        self._stdin.flush()

    def close_stdin(self) -> None:
        self._stdin.close()

    def wait_for(self, kind: str, *, step: int | None = None, seconds: float = 120) -> Any:
        """The first event of a kind (and step), or an error that shows the events received instead."""

        def found() -> Any:
            return next(
                (e for e in self.events if e.kind == kind and (step is None or getattr(e, "step", None) == step)), None
            )

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, timeout=seconds)
            event = found()
        assert event is not None, [e.model_dump(exclude={"job_id"}) for e in self.events][-4:]
        return event

    def wait_until_ready(self, *, served: int = 0, seconds: float = 120) -> Ready:
        """Waits until a warm trainer has finished `served` lines and is ready for the next one."""

        def found() -> Ready | None:
            return next((ready for ready in self.readies if ready.served == served), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, timeout=seconds)
            ready = found()
        assert ready is not None, [e.model_dump(exclude={"job_id"}) for e in self.events][-4:]
        return ready

    def exit_status(self, seconds: float = 120) -> int:
        status = self.process.wait(timeout=seconds)
        self._reader.join(timeout=10)
        return status

    def stop_listening(self) -> None:
        """Closes our end of the pipe at the next event."""
        self._deaf = True

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def start(*specs: JobSpec, arguments: Sequence[str] = (), forked: bool = False) -> Iterator[Child]:
    """A trainer that gets these specs and no more; it is killed at the end in any case.

    `forked`: from a process that has imported the libraries, for tests of what comes after a trainer's start.
    """
    reading, writing = os.pipe()
    theirs, ours = os.pipe()
    given = ("-m", "training", "--events-fd", str(writing), *arguments)
    process: subprocess.Popen[bytes] | ForkedProcess
    with Path(os.devnull).open("r+b") as nothing:
        if forked:
            files = {0: theirs, 1: nothing.fileno(), 2: nothing.fileno(), writing: writing}
            process = forker(str(TRAINER_PYTHON)).start(os.environ, ROOT, files, *given)
        else:
            process = subprocess.Popen(
                [sys.executable, *given],
                stdin=theirs, stdout=nothing, stderr=nothing, pass_fds=[writing], cwd=ROOT, start_new_session=True,
            )  # fmt: skip
    os.close(writing)
    os.close(theirs)
    with os.fdopen(ours, "wb") as stdin:
        child = Child(process, stdin, reading)
        try:
            for spec in specs:
                child.send(spec.model_dump_json())
            if specs:
                child.close_stdin()
            yield child
        finally:
            process.kill()
            process.wait(timeout=30)
