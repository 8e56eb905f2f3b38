"""A token bucket for each key."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Bucket:
    """Tokens that come back at a steady rate, up to twice as many as a second brings."""

    rate: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._size = max(1.0, 2 * self.rate)
        self._left = self._size
        self._filled_at = self.clock()

    def take(self) -> float:
        """Take one token. Returns 0, or the seconds until there is one."""
        now = self.clock()
        self._left = min(self._size, self._left + (now - self._filled_at) * self.rate)
        self._filled_at = now
        if self._left < 1.0:
            return (1.0 - self._left) / self.rate
        self._left -= 1.0
        return 0.0
