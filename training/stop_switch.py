"""The wish to stop: SIGTERM ends a run at once before training, and after the step in hand while training."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.events import EXIT_STOPPED

# How the launcher passes a SIGTERM on to its ranks. Their own SIGTERM comes from the engine when another rank has
# failed, and must end a rank that waits inside of an exchange, where no Python handler would run.
STOP_A_RANK = signal.SIGUSR1


class StopSwitch:
    """Remembers SIGTERM. Inside `at_the_next_step` it only sets a flag; outside it ends the process."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def listen(self, number: signal.Signals = signal.SIGTERM) -> None:
        signal.signal(number, self._on_signal)

    @contextmanager
    def at_the_next_step(self) -> Iterator[None]:
        """While this is open somebody else looks at `requested` and leaves a checkpoint behind."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # Once: a second one, to the group and to the process, must not break into the way out of the first.
        already, self.requested = self.requested, True
        if not self._deferred and not already:
            raise SystemExit(EXIT_STOPPED)
