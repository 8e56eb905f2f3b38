"""Which conversations make up each micro-batch: a function of seed, epoch and position, not of who trains.

An optimizer step takes the next `batch_size` conversations of the epoch's permutation. Each rank takes every n-th of
them and works through its share in as many micro-batches as the others; so any number of ranks makes the same steps,
and a checkpoint may be continued by any other number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from training.plan import Plan
from training.ranks import Ranks

_MASK = (1 << 64) - 1


class StepOrder(Sampler[list[int]]):
    """Micro-batches of row numbers, one epoch an iteration.

    Row number `examples`, behind the last, must hold no word to learn from: a rank that has no conversation left in
    the last step of an epoch takes it, and goes through the step with the others.
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
        """Micro-batches an epoch; the same on every rank."""
        full, rest = divmod(self._examples, self._plan.batch_size)
        return full * self._plan.accumulation + self._micro_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, self._epoch))
        order = torch.randperm(self._examples, generator=generator).tolist()
        for start in range(0, self._examples, self._plan.batch_size):
            together = order[start : start + self._plan.batch_size]
            mine = self._ranks.share(together)
            for number in range(self._micro_batches(len(together))):
                part = mine[number * self._plan.micro_batch : (number + 1) * self._plan.micro_batch]
                yield list(part) or [self._examples]

    def _micro_batches(self, conversations: int) -> int:
        """How many micro-batches the rank with the most conversations of a step needs."""
        return math.ceil(math.ceil(conversations / self._ranks.count) / self._plan.micro_batch)


def mixed_seed(seed: int, *numbers: int) -> int:
    """A seed of its own for each combination: seeds that differ by one must not give shifted copies of one stream."""
    state = seed & _MASK
    for number in numbers:
        # SplitMix64 (Steele, Lea, Flood 2014).
        state = (state + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
