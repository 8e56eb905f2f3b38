"""The command line as a person and a program use it: a real process, in a pipe or on a terminal of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.daemon_process import eventually
from tests.paths import ROOT


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
            **environment,
        }

    def run(self, *words: object, stdin: str = "", **environment: str) -> Said:
        """Run a command to its end in a pipe. Never a traceback, whatever was wrong."""
        done = subprocess.run(
            self._command(words),
            env=self.environment | environment,
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
        said = Said(done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in said.err + said.out, said
        return said

    def ok(self, *words: object, **environment: str) -> Said:
        said = self.run(*words, **environment)
        assert said.status == 0, said
        return said

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Begin a command in a pipe; whoever starts it ends it."""
        return subprocess.Popen(
            self._command(words),
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def terminal(self, *words: object, columns: int = 80, rows: int = 40) -> Terminal:
        return Terminal(self._command(words), self.environment | {"TERM": "xterm-256color"}, self.folder, columns, rows)

    @staticmethod
    def _command(words: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", "daemon", *map(str, words)]


class Terminal:
    """A command on a terminal; a context manager, nothing of it is alive afterwards."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, columns: int, rows: int) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (rows, columns))
        self.screen = ""
        self.process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
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
        return self.process.returncode
