"""Runs a daemon as a separate process for tests: started with settings, observed by its log, ended by its pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.forked_process import ForkedProcess, forker
from tests.forked_python import forked_python
from tests.paths import REAL_DAEMON, ROOT, SCRIPTED_DAEMON

T = TypeVar("T")
SCRIPTED = (sys.executable, str(SCRIPTED_DAEMON))
REAL = (sys.executable, "-m", "daemon", "run")
FORKED_REAL = (sys.executable, str(REAL_DAEMON))


class DaemonProcess:
    """Use as a context manager: none of its processes is alive afterwards."""

    def __init__(
        self,
        dsn: str,
        folder: Path,
        *,
        name: str = "daemon",
        command: tuple[str, ...] = SCRIPTED,
        forked: bool = True,
        **settings: object,
    ) -> None:
        self.folder = folder
        self.log_path = folder / f"{name}.log"
        self.command = command
        self._forked = forked
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DATABASE_URL": dsn,
            "TRAINER_DEVICE": "cpu",
            "TRAINER_STORAGE": "folder",
            "TRAINER_STORAGE_DIR": str(folder / "storage"),
            "TRAINER_WORK_DIR": str(folder / "jobs"),
            "TRAINER_MODELS_DIR": str(folder / "models"),
            "TRAINER_MODEL_DOWNLOADS": "false",
            "TRAINER_LOG_FORMAT": "json",
            "TRAINER_LEASE_SECONDS": "3",
            "TRAINER_POLL_SECONDS": "5",
            "TRAINER_DRAIN_SECONDS": "10",
            "TRAINER_KILL_SECONDS": "1",
            "TRAINER_RETRY_BACKOFF_SECONDS": "0.2",
            # A whole test run may force one type.
            "TRAINER_COMPUTE_TYPE": os.environ.get("TRAINER_COMPUTE_TYPE", "auto"),
        } | {f"TRAINER_{name.upper()}": str(value) for name, value in settings.items()}
        if command == FORKED_REAL:
            self.environment["FORKED_PYTHON"] = str(forked_python())
        self.process: subprocess.Popen[bytes] | ForkedProcess | None = None

    def __enter__(self) -> DaemonProcess:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.kill()

    def start(self) -> DaemonProcess:
        """Forks our scripts from a process that has imported them, unless the script must import other modules."""
        _python, script, *arguments = self.command
        if self._forked and script.endswith(".py") and self.environment["PYTHONPATH"] == str(ROOT):
            self.process = forker(script).start_quietly(self.environment, self.folder, self.log_path, *arguments)
            return self
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> Iterator[dict[str, Any]]:
        for line in self.log_path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def logged(self, event: str, **fields: object) -> list[dict[str, Any]]:
        return [
            line
            for line in self.log()
            if line.get("event") == event and all(line.get(key) == value for key, value in fields.items())
        ]

    def wait_for_log(self, event: str, *, seconds: float = 20.0, count: int = 1, **fields: object) -> dict[str, Any]:
        def seen() -> dict[str, Any] | None:
            found = self.logged(event, **fields)
            return found[count - 1] if len(found) >= count else None

        return eventually(seen, seconds=seconds, why=lambda: f"no {event} in\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_path.read_text().splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 20.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)

    def children(self) -> list[int]:
        return children_of(self.pid)


def children_of(pid: int) -> list[int]:
    """Returns the live processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(
    question: Callable[[], T | None], *, seconds: float = 20.0, why: Callable[[], str] = lambda: "it never came true"
) -> T:
    """Polls until the answer is truthy; fails after a deadline, with the reason."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := question():
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(why())
        time.sleep(0.03)
