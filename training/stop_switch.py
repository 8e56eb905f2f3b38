"""Stop requests: SIGTERM ends a run immediately before training starts, and after the current step once it has."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.events import EXIT_STOPPED

# How the launcher passes SIGTERM on to its ranks. A rank gets a real SIGTERM from the engine when another rank has
# failed, and that must end it even inside an exchange, where no Python handler would run.
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
        """Inside this context SIGTERM only sets `requested`; the training loop reads it and saves a checkpoint."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # Only once: a second SIGTERM (one to the group, one to the process) must not interrupt the exit of the first.
        already, self.requested = self.requested, True
        if not self._deferred and not already:
            raise SystemExit(EXIT_STOPPED)
