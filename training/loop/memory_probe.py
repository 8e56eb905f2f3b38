"""Finds the largest micro-batch that fits in GPU memory by running one forward and backward pass before training.

The memory of a pass beyond the weights is assumed to grow with its tokens. Where there is room for more, that errs on
the safe side, since unpacked experts and the loss's slices do not grow; where there is too little, recovery from
out-of-memory remains. The answer is the plan's number doubled or halved, so that GPUs of one kind agree.
"""

from __future__ import annotations

from typing import Protocol

import torch

# Beyond 32k tokens dequantising takes a few hundredths of a micro-batch's time, and more tokens would gain nothing.
_DOUBLINGS = 2
_HALVINGS = 3
# Leaves room for fragmentation, and for batches with other lengths than the probe's.
_USABLE = 0.9


class MemoryGauge(Protocol):
    """Reads memory, in bytes."""

    def begin(self) -> int:
        """Memory in use now; starts measuring the peak."""

    def peak(self) -> int:
        """Returns the most memory in use at once since `begin`."""

    def capacity(self) -> int:
        """Returns the most memory that this process could use."""


class CardGauge:
    """The GPU that this process computes on, as torch's allocator sees it."""

    def begin(self) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def capacity(self) -> int:
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()


def gauge_of(device: str) -> MemoryGauge | None:
    """None on a CPU: micro-batches are small there to fit its caches, and the estimate has checked its memory."""
    return CardGauge() if device == "cuda" else None


def tokens_that_fit(planned: int, tried: int, *, in_use: int, peak: int, capacity: int) -> int:
    """`planned` tokens per micro-batch, doubled or halved to fit into the GPU, after a pass of `tried` tokens."""
    bytes_per_token = max(1, peak - in_use) / tried
    room = max(0, int(_USABLE * capacity) - in_use)
    for doublings in range(_DOUBLINGS, -_HALVINGS, -1):
        tokens = int(planned * 2.0**doublings)
        if tokens * bytes_per_token <= room:
            return tokens
    return planned >> _HALVINGS
