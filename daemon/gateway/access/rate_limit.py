"""Limits the rate of calls with one token bucket per key."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Bucket:
    """A token bucket that refills at a steady rate, up to the tokens of two seconds."""

    rate: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._size = max(1.0, 2 * self.rate)
        self._left = self._size
        self._filled_at = self.clock()

    def take(self) -> float:
        """Takes one token. Returns 0, or the seconds until there is one."""
        now = self.clock()
        self._left = min(self._size, self._left + (now - self._filled_at) * self.rate)
        self._filled_at = now
        if self._left < 1.0:
            return (1.0 - self._left) / self.rate
        self._left -= 1.0
        return 0.0
