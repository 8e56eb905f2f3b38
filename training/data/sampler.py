"""Chooses the conversations of each optimizer step from seed, epoch and position, independent of the number of ranks.

A step takes the next `batch_size` conversations of the epoch's permutation, and each rank takes every n-th of them. So
any number of ranks makes the same steps, and a checkpoint can be continued with a different number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from training.data.plan import Plan
from training.ranks import Ranks

_MASK = (1 << 64) - 1


class StepOrder(Sampler[list[int]]):
    """Row numbers of this rank's share of each step; one iteration is one epoch.

    Row number `examples`, after the last, must carry no loss: a rank without a conversation left in the last step of an
    epoch takes it, so that it goes through the step with the others.
    """

    def __init__(self, examples: int, plan: Plan, ranks: Ranks, seed: int) -> None:
        self._examples = examples
        self._plan = plan
        self._ranks = ranks
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self._examples / self._plan.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, self._epoch))
        order = torch.randperm(self._examples, generator=generator).tolist()
        for start in range(0, self._examples, self._plan.batch_size):
            yield list(self._ranks.share(order[start : start + self._plan.batch_size])) or [self._examples]


def mixed_seed(seed: int, *numbers: int) -> int:
    """Mixes a seed for each combination: seeds that differ by one must not give shifted copies of one stream."""
    state = seed & _MASK
    for number in numbers:
        # SplitMix64 (Steele, Lea, Flood 2014).
        state = (state + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
