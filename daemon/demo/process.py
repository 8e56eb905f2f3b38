"""A process of the demo's own: started beside it, watched, and ended with everything that it started."""

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
    """Runs a command with its output in a file; on leaving, no process of its group is alive.

    TERM asks; a second TERM says that nobody waits for checkpoints; KILL ends what is left.
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
                # Its own session: Ctrl-C at the terminal is for the demo, which ends its processes in order.
                start_new_session=True,
                # A demo that is killed without a word takes its daemon along. By KILL: Postgres goes too, and a daemon
                # that was only asked would wait for ever to write the job's ending.
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
        with contextlib.suppress(ProcessLookupError):  # nobody of its group is left: what we want
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
        """The end of what it said."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def _ended_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True
