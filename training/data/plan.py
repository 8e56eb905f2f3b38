"""The run's numbers, decided before the model is loaded: tokens a micro-batch, steps, warm-up, the compute type."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.compute import ComputeType, compute_type
from training.data.corpus import Corpus
from training.spec import JobSpec

# Tokens per micro-batch. On a GPU the frozen experts are dequantised once per micro-batch, so more tokens are nearly
# free until memory ends (training.loop.memory_probe finds the limit); on a CPU small batches stay in its caches.
_TOKENS_PER_MICRO_BATCH = {"cuda": 8192, "cpu": 2048}
# A short warm-up is enough for LoRA, whose B matrices begin at zero. Rounded down: the first warm-up step learns at a
# rate of zero, and a short run cannot afford to waste a step.
_WARMUP_SHARE = 0.03
# What nobody is asked. One pass over each parameter instead of a dozen: eight-bit moments would save three quarters of
# 0.13 to 0.3 GiB (17 to 40 M trained weights), little beside a base model of gigabytes.
OPTIMIZER = "adamw_torch_fused"
SCHEDULE = "cosine"
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """One optimizer step uses `batch_size` conversations, as requested, however many processes share the work.

    Each of `ranks` processes handles its share in micro-batches of at most `micro_batch_tokens` tokens, or of a single
    longer conversation.
    """

    batch_size: int
    ranks: int
    micro_batch_tokens: int
    steps_per_epoch: int
    epochs: int
    warmup_steps: int
    compute_type: ComputeType

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def share(self) -> int:
        """The most conversations of a step that one process gets."""
        return math.ceil(self.batch_size / self.ranks)

    def heaviest_tokens(self, max_length: int) -> int:
        """Returns the tokens of the largest possible micro-batch, padding included."""
        return min(self.share * max_length, max(self.micro_batch_tokens, max_length))

    @property
    def idle_ranks(self) -> int:
        """Processes without work, because the batch is smaller than their number."""
        return max(0, self.ranks - self.batch_size)


def make_plan(spec: JobSpec, corpus: Corpus) -> Plan:
    chosen = spec.hyperparameters
    steps_per_epoch = math.ceil(len(corpus.train) / chosen.batch_size)
    total = steps_per_epoch * chosen.num_epochs
    warmup = chosen.warmup_steps if chosen.warmup_steps is not None else int(total * _WARMUP_SHARE)
    return Plan(
        batch_size=chosen.batch_size,
        ranks=spec.num_gpus,
        micro_batch_tokens=_TOKENS_PER_MICRO_BATCH[spec.device],
        steps_per_epoch=steps_per_epoch,
        epochs=chosen.num_epochs,
        warmup_steps=min(warmup, total),
        compute_type=compute_type(spec.device, spec.compute_type),
    )
