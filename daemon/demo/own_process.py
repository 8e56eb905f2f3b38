"""Runs a process for the demo, and ends it with all its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from training.death_signal import ending_with_parent


class OwnProcess:
    """Runs a command with its output in a file. When the context ends, no process of its group is alive.

    TERM asks it to stop; a second TERM asks it not to save checkpoints; KILL ends what is left.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self._command = list(command)
        self._env = dict(env)
        self._cwd = cwd
        self._log = log

    def __enter__(self) -> OwnProcess:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd=self._cwd,
                # Its own session: Ctrl-C at the terminal reaches only the demo, which ends its processes in order.
                start_new_session=True,
                # A killed demo ends its daemon, too. With KILL, because Postgres ends as well: after TERM, the daemon
                # would wait for ever to write the job's outcome.
                preexec_fn=ending_with_parent(signal.SIGKILL),  # noqa: PLW1509 one prctl call, loaded before the fork
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGTERM, 10.0)):
            if self._process.poll() is None:
                self._process.send_signal(number)
            if self._ended_within(seconds):
                break
        with contextlib.suppress(ProcessLookupError):  # no process of its group is left, as we want
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.poll()

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of its output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def _ended_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True
