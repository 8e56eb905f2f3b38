"""The run's numbers, decided before the model is loaded: micro-batch, accumulation, steps, warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.corpus import Corpus
from training.spec import JobSpec

# Tokens a micro-batch. On a card the frozen experts are dequantised once a micro-batch, so more tokens are nearly
# free until memory ends; on a CPU small batches stay in its caches.
_TOKENS_PER_MICRO_BATCH = {"cuda": 8192, "cpu": 2048}
# A short warm-up is enough for LoRA, whose B matrices begin at zero.
_WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    """One optimizer step sees micro_batch × accumulation conversations: the batch size that was asked for."""

    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    epochs: int
    warmup_steps: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs


def make_plan(spec: JobSpec, corpus: Corpus) -> Plan:
    """Split the batch that was asked for into micro-batches that fit."""
    chosen = spec.hyperparameters
    room = max(1, _TOKENS_PER_MICRO_BATCH[spec.device] // corpus.max_length)
    micro_batch = max(
        size for size in range(1, chosen.batch_size + 1) if chosen.batch_size % size == 0 and size <= room
    )
    accumulation = chosen.batch_size // micro_batch
    steps_per_epoch = math.ceil(math.ceil(len(corpus.train) / micro_batch) / accumulation)
    total = steps_per_epoch * chosen.num_epochs
    warmup = chosen.warmup_steps if chosen.warmup_steps is not None else math.ceil(total * _WARMUP_SHARE)
    return Plan(micro_batch, accumulation, steps_per_epoch, chosen.num_epochs, min(warmup, total))
