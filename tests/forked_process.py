"""Runs Python scripts as separate processes that share their imports: forked from a process that has imported them.

Starting the daemon or a command takes half a second of a core, and a trainer three, all of it imports; the tests start
them hundreds of times. A forked process has its own environment, folder, session and files, like a started one; but in
/proc it shows the arguments and the environment of the process that it was forked from.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tests.paths import ROOT

_LONGEST_ORDER = 200_000
_MOST_FILES = 16
_ABOVE = 512


class Forker:
    """The process that has imported a script, as the tests see it."""

    def __init__(self, script: str) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A separate session: Control-C must reach only the tests.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_process", script],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=theirs, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        atexit.register(self._end)
        self._ended: dict[int, int] = {}
        self._rest = b""
        self._one_reader = threading.Lock()

    @property
    def pid(self) -> int:
        """The parent of all processes that it starts."""
        return self._process.pid

    def start(
        self, environment: Mapping[str, str], folder: Path, files: Mapping[int, int], *arguments: str
    ) -> ForkedProcess:
        """Starts the script. `files` gives it our descriptors (the values) under its own numbers (the keys)."""
        order = {
            "environment": dict(environment), "folder": str(folder), "files": list(files), "arguments": arguments
        }  # fmt: skip
        with self._one_reader:
            socket.send_fds(self._orders, [json.dumps(order).encode()], list(files.values()))
            while True:
                line = self._read_line(60.0)
                assert line is not None, "the forker does not answer"
                if "pid" in line:
                    return ForkedProcess(self, line["pid"])

    def start_quietly(self, environment: Mapping[str, str], folder: Path, log: Path, *arguments: str) -> ForkedProcess:
        """Starts the script without input, and with its output in a file."""
        with Path(os.devnull).open("rb") as nothing, log.open("ab") as output:
            files = {0: nothing.fileno(), 1: output.fileno(), 2: output.fileno()}
            return self.start(environment, folder, files, *arguments)

    def status(self, pid: int, seconds: float) -> int | None:
        """Returns the exit status of a process that has ended; None if it runs longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            with self._one_reader:
                # First read what is there, then wait a moment, during which no other thread may read.
                while pid not in self._ended and self._read_line(0.0) is not None:
                    pass
                if pid in self._ended:
                    return self._ended[pid]
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._read_line(min(left, 0.05))

    def _read_line(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            with selectors.DefaultSelector() as selector:
                selector.register(file, selectors.EVENT_READ)
                if not selector.select(seconds):
                    return None
            piece = os.read(file, 65536)
            assert piece, "the forker has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\n")
        line: dict[str, Any] = json.loads(text)
        if "ended" in line:
            self._ended[line["ended"]] = line["status"]
        return line

    def _end(self) -> None:
        self._orders.close()
        self._process.wait(10)


@cache
def forker(script: str) -> Forker:
    return Forker(script)


class ForkedProcess:
    """Offers subprocess.Popen's interface for a forked process."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self._forker = forker
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forker.status(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self.returncode = self._forker.status(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class PipedProcess(ForkedProcess):
    """A forked process whose output is read here, as text."""

    def __init__(
        self, forker: Forker, environment: Mapping[str, str], folder: Path, *arguments: str, stdin: str = ""
    ) -> None:
        with tempfile.TemporaryFile() as given, ExitStack() as theirs:
            given.write(stdin.encode())
            given.seek(0)
            self.stdout, out = _pipe(theirs)
            self.stderr, err = _pipe(theirs)
            started = forker.start(environment, folder, {0: given.fileno(), 1: out, 2: err}, *arguments)
        super().__init__(forker, started.pid)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Returns what it writes until its end. A process that outlives `timeout` is killed."""
        alarm = threading.Timer(timeout, self.kill)
        alarm.start()
        try:
            with ThreadPoolExecutor(1) as other:
                err = other.submit(self.stderr.read)
                return self.stdout.read(), err.result()
        finally:
            alarm.cancel()
            self.wait(timeout)


def _pipe(theirs: ExitStack) -> tuple[TextIO, int]:
    """The end that we read, and the number of theirs, which is closed here when they have it."""
    ours, other = os.pipe()
    theirs.callback(os.close, other)
    return os.fdopen(ours, encoding="utf-8"), other


# -- the other side ------------------------------------------------------------------------------------------------


def run_script(script: str, order: dict[str, Any], given: list[int]) -> int:
    """In the child: runs the script as the interpreter would."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(order["folder"])
    # First all of them above the numbers that any of them shall have.
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, _ABOVE) for file in given]
    os.closerange(3, _ABOVE)
    for number, file in zip(order["files"], above, strict=True):
        os.dup2(file, number)
    os.closerange(_ABOVE, 2 * _ABOVE)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [script, *order["arguments"]]
    for output in (sys.stdout, sys.stderr):
        assert isinstance(output, io.TextIOWrapper)
        output.reconfigure(line_buffering=output is sys.stderr or output.isatty())
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 as the interpreter would end
        traceback.print_exc()
        return 1
    return 0


def serve(script: str) -> None:
    """Forks when told to and reports which processes have ended; ends when the tests do."""
    runpy.run_path(script, run_name="imported")
    assert threading.active_count() == 1, "a fork would lose the other threads"
    gc.freeze()
    answers = os.dup(1)
    reader, writer = os.pipe()
    for file in (reader, writer):
        os.set_blocking(file, False)
    signal.signal(signal.SIGCHLD, _heard)
    signal.set_wakeup_fd(writer)

    def say(**line: int) -> None:
        os.write(answers, json.dumps(line).encode() + b"\n")

    orders = socket.socket(fileno=os.dup(0))
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(reader, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if reader in ready:
                os.read(reader, 4096)
                while True:
                    try:
                        pid, status = os.waitpid(-1, os.WNOHANG)
                    except ChildProcessError:
                        break
                    if pid == 0:
                        break
                    say(ended=pid, status=os.waitstatus_to_exitcode(status))
            if 0 in ready:
                order, given, _flags, _address = socket.recv_fds(orders, _LONGEST_ORDER, _MOST_FILES)
                if not order:
                    return
                sys.stdout.flush()
                pid = os.fork()
                if pid == 0:
                    status = 70
                    try:
                        status = run_script(script, json.loads(order), given)
                        sys.stdout.flush()
                        sys.stderr.flush()
                    finally:
                        os._exit(status)
                for file in given:
                    os.close(file)
                say(pid=pid)


def _heard(_number: int, _frame: FrameType | None) -> None:
    """A handler that does nothing: an ignored signal would not wake the loop."""


if __name__ == "__main__":
    serve(sys.argv[1])
