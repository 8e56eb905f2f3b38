"""The wish to stop: SIGTERM ends a run at once before training, and after the step in hand while training."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.events import EXIT_STOPPED


class StopSwitch:
    """Remembers SIGTERM. Inside `at_the_next_step` it only sets a flag; outside it ends the process."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._on_sigterm)

    @contextmanager
    def at_the_next_step(self) -> Iterator[None]:
        """While this is open somebody else looks at `requested` and leaves a checkpoint behind."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        # Once: a second one, to the group and to the process, must not break into the way out of the first.
        already, self.requested = self.requested, True
        if not self._deferred and not already:
            raise SystemExit(EXIT_STOPPED)
