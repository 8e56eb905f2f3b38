"""The command line as a person and a program use it: a process of its own, in a pipe or on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.daemon_process import eventually
from tests.forked_process import PipedProcess, forker
from tests.forked_python import forked_python
from tests.paths import COMMAND_LINE, ROOT


@dataclass(frozen=True)
class Said:
    """What a command wrote and how it ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


class CommandLine:
    """`brightrun-trainer` with an environment of its own, in a folder of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "FORKED_PYTHON": str(forked_python()),
            **environment,
        }

    def run(self, *words: object, stdin: str = "", **environment: str) -> Said:
        """Run a command to its end in a pipe. Never a traceback, whatever was wrong."""
        process = self.start(*words, stdin=stdin, **environment)
        out, err = process.communicate(170)
        said = Said(process.wait(10), out, err)
        assert "Traceback" not in said.err + said.out, said
        return said

    def ok(self, *words: object, **environment: str) -> Said:
        said = self.run(*words, **environment)
        assert said.status == 0, said
        return said

    def start(self, *words: object, stdin: str = "", **environment: str) -> PipedProcess:
        """Begin a command in a pipe; whoever starts it ends it."""
        given = self.environment | environment
        return PipedProcess(forker(str(COMMAND_LINE)), given, self.folder, *map(str, words), stdin=stdin)

    def terminal(self, *words: object, columns: int = 80, rows: int = 40) -> Terminal:
        return Terminal(words, self.environment | {"TERM": "xterm-256color"}, self.folder, columns, rows)


class Terminal:
    """A command on a terminal; a context manager, nothing of it is alive afterwards."""

    def __init__(
        self, words: tuple[object, ...], environment: dict[str, str], folder: Path, columns: int, rows: int
    ) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (rows, columns))
        self.screen = ""
        files = dict.fromkeys(range(3), slave)
        self.process = forker(str(COMMAND_LINE)).start(environment, folder, files, *map(str, words))
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._master)

    def read(self) -> str:
        """Everything that was written so far."""
        while select.select([self._master], [], [], 0)[0]:
            try:
                piece = os.read(self._master, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            self.screen += piece.decode(errors="replace")
        return self.screen

    def wait_for(self, words: str, seconds: float = 30.0) -> None:
        eventually(lambda: words in self.read(), seconds=seconds, why=lambda: f"no {words!r} on\n{self.screen[-2000:]}")

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def wait(self, seconds: float = 30.0) -> int:
        """Its exit status; the terminal is read meanwhile, so that it never waits for us."""
        deadline = time.monotonic() + seconds

        def ended() -> bool:
            self.read()
            return self.process.poll() is not None

        eventually(ended, seconds=max(deadline - time.monotonic(), 0.1), why=lambda: f"still there:\n{self.screen}")
        self.read()
        assert self.process.returncode is not None
        return self.process.returncode
