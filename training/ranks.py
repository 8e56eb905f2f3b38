"""One job on several GPUs: which of its processes this one is, and how they exchange data.

Every rank runs the same recipe on the same files and must reach the same decisions. So anything that could differ
between ranks (a clock, a signal, a sum over its own conversations) is exchanged here before it is used. Flags and
numbers travel between CPUs (gloo), GPU tensors between GPUs (NCCL). A job of one process exchanges nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from training.stop_switch import StopSwitch

T = TypeVar("T")

# An exchange that takes longer fails, and the attempt with it. Longer than writing the 4-bit copy of an 80 B model,
# which the first rank does alone. The daemon's own watchdog may be stricter.
EXCHANGE_SECONDS = 1800.0
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class Ranks:
    """This process, as one of the `count` processes of a job."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """True for the rank that reports events and writes the checkpoints and the adapter."""
        return self.index == 0

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """This rank's part of work that is split between all ranks."""
        return things[self.index :: self.count]

    def exchange(self, numbers: Iterable[float]) -> list[list[float]]:
        """Returns every rank's numbers, in rank order; the same on all ranks."""
        mine = torch.tensor(list(numbers), dtype=torch.float64)
        if self.count == 1:
            return [mine.tolist()]
        everyones = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyones, mine)
        return [numbers.tolist() for numbers in everyones]

    def total(self, *numbers: float) -> list[float]:
        """Returns the sums over all ranks, added up in the same order everywhere."""
        return [sum(column) for column in zip(*self.exchange(numbers), strict=True)]

    def agree_to_stop(self, stop: StopSwitch) -> bool:
        """Returns True on every rank as soon as any rank has been asked to stop."""
        if any(asked for (asked,) in self.exchange([stop.requested])):
            stop.requested = True
        return stop.requested

    def as_the_first(self, find: Callable[[], T]) -> T:
        """Runs `find` on the first rank and returns its result on all of them. The result must be picklable."""
        if self.count == 1:
            return find()
        found: list[Any] = [find() if self.is_first else None]
        dist.broadcast_object_list(found, src=0)
        answer: T = found[0]
        return answer

    def one_after_the_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on the first rank, then on all others at once: they read what the first one left on disk."""
        if self.is_first:
            done = work()
            self.exchange([0.0])
            return done
        self.exchange([0.0])
        return work()

    def one_by_one(self, work: Callable[[], T]) -> T:
        """Runs `work` on one rank after the other: the host has memory for only one at a time."""
        done: T | None = None
        for turn in range(self.count):
            if turn == self.index:
                done = work()
            self.exchange([0.0])
        assert done is not None
        return done

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by the mean over all ranks, in one exchange.

        Used instead of DistributedDataParallel, which exchanges during backward: a rank that runs out of memory half
        way, and repeats its micro-batch in halves, would leave the others waiting. An adapter's gradients are some
        tens of megabytes once a step, too few to be worth overlapping with backward.
        """
        if self.count == 1:
            return
        trained = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        means = flat.split([gradient.numel() for gradient in gradients])
        for parameter, mean in zip(trained, means, strict=True):
            parameter.grad = mean.view_as(parameter)


ALONE = Ranks()


def join(device: str) -> Ranks:
    """Joins the other ranks at the address that the engine set in the environment."""
    dist.init_process_group(_BACKENDS[device], timeout=timedelta(seconds=EXCHANGE_SECONDS))
    if device == "cuda":
        # Each rank sees only one GPU (training.launch.rank_main).
        torch.cuda.set_device(0)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def leave() -> None:
    dist.destroy_process_group()
