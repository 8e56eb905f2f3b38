"""Turns Ctrl-C and TERM into a flag that the demo checks between its steps, so that clean-up is never interrupted."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType


class EndedBySignal(Exception):
    """A signal asked the demo to end. `exit_status` is the shell's exit status for the signal."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_status = 128 + number


class Interruption:
    """A context in which SIGINT, SIGTERM and SIGHUP are only remembered; `check` raises EndedBySignal for them.

    (A handler that raises at any point could do so between the start of a process and the line that
    registers it to be ended.)
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._received: signal.Signals | None = None

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._remember) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self._received is not None:
            raise EndedBySignal(self._received)

    def sleep(self, seconds: float) -> None:
        """Waits `seconds`, or until a signal. Raises EndedBySignal."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            # Python resumes a sleep after a handler returns: sleep in pieces too short to notice.
            time.sleep(min(left, 0.1))
        self.check()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number)
