"""How many tokens a micro-batch may have on this card: asked of the card itself, by one pass before the first step.

What a pass takes beyond the weights is taken to grow with its tokens. That errs to the safe side where there is room
for more, since unpacked experts and the loss's slices do not grow; where there is too little, recovery from
out-of-memory remains. Answers are the plan's number doubled or halved, so that cards of one kind agree.
"""

from __future__ import annotations

from typing import Protocol

import torch

# Beyond 32k tokens dequantising is a few hundredths of a micro-batch, and more would buy nothing.
_DOUBLINGS = 2
_HALVINGS = 3
# Fragmentation, and batches whose conversations differ in length from those of the pass.
_USABLE = 0.9


class MemoryGauge(Protocol):
    """Where memory is read. Bytes."""

    def begin(self) -> int:
        """What is in use now; the peak is counted from here."""

    def peak(self) -> int:
        """The most that was in use at once since."""

    def capacity(self) -> int:
        """The most that this process could use."""


class CardGauge:
    """The card that this process computes on, as torch's allocator sees it."""

    def begin(self) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def capacity(self) -> int:
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()


def gauge_of(device: str) -> MemoryGauge | None:
    """None on a CPU: its micro-batches are small for the caches' sake, and the estimate has looked at its memory."""
    return CardGauge() if device == "cuda" else None


def tokens_that_fit(planned: int, tried: int, *, in_use: int, peak: int, capacity: int) -> int:
    """`planned` tokens a micro-batch, doubled or halved to what the card can take, after a pass of `tried` tokens."""
    bytes_per_token = max(1, peak - in_use) / tried
    room = max(0, int(_USABLE * capacity) - in_use)
    for doublings in range(_DOUBLINGS, -_HALVINGS, -1):
        tokens = int(planned * 2.0**doublings)
        if tokens * bytes_per_token <= room:
            return tokens
    return planned >> _HALVINGS
