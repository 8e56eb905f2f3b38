"""Keeps frozen weights dequantised in spare memory, so that they are dequantised once instead of at every step.

A short step spends more time on unpacking weights than on multiplying with them, since each is unpacked forward and
backward whatever the number of tokens. The packed bytes stay where they are (they are saved and fingerprinted). The
values are those that unpacking gives each time, so the adapter is the same to the last bit: how much is kept changes
only the time.

Kept for a number: with equal settings plain TRL took 0.98 to 1.09 times our CPU seconds on short conversations of a
small mixture before, and 1.25 to 1.41 times with this (benchmarks/train_throughput.py); the service promises never to
be slower. A step of the demo's dense model takes 2.3 CPU seconds where it took 2.65.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import functional

from training.files.free_memory import free_bytes
from training.preflight.estimate import Estimate
from training.quantization.experts import expert_states, has_fused_experts, unpacked_experts
from training.quantization.nf4 import unpack
from training.spec import JobSpec

# The other half is for other processes on this host, and for what the estimate missed.
_SHARE = 0.5
_UNPACKED = "nf4_unpacked"


@dataclass(frozen=True)
class Kept:
    """How many of the frozen 4-bit weights were kept unpacked, and the memory they take."""

    bytes: int
    weights: int
    of_weights: int


@dataclass(frozen=True)
class _Weight:
    """One packed weight: its unpacked size, and how to keep it where its module finds it."""

    unpacked_bytes: int
    keep: Callable[[], None]


def spare_bytes(spec: JobSpec, estimate: Estimate) -> int:
    """Returns the memory that one process of the run may use for this, once its model is loaded.

    Half of what is free beyond the run's own need. None on a GPU: its memory gains more as tokens per micro-batch
    (training.loop.memory_probe), which share one unpacking.
    """
    if spec.device == "cuda":
        return 0
    still_needed = estimate.memory_bytes - estimate.model_bytes
    return max(0, int(_SHARE * (free_bytes() / spec.num_gpus - still_needed)))


def keep_unpacked(model: torch.nn.Module, most_bytes: int) -> Kept:
    """Unpacks as many frozen weights as fit into `most_bytes`, in the order of the model's layers."""
    kept_bytes = kept = count = 0
    for weight in _packed_weights(model):
        count += 1
        if kept_bytes + weight.unpacked_bytes <= most_bytes:
            weight.keep()
            kept_bytes += weight.unpacked_bytes
            kept += 1
    return Kept(kept_bytes, kept, count)


def unpacked_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """Returns a linear layer's weight if it is kept unpacked."""
    return module.__dict__.get(_UNPACKED)


def _packed_weights(model: torch.nn.Module) -> Iterator[_Weight]:
    for module in model.modules():
        if isinstance(module, Linear4bit):
            yield _Weight(_bytes_of(module.weight.quant_state), partial(_keep_linear, module))
        elif has_fused_experts(module):
            for name, state in expert_states(module).items():
                yield _Weight(_bytes_of(state), partial(_keep_experts, module, name))


def _bytes_of(state: bnb.QuantState) -> int:
    return int(state.shape.numel() * state.dtype.itemsize)


def _keep_experts(module: torch.nn.Module, name: str) -> None:
    packed = module._parameters[name]
    assert packed is not None
    unpacked_experts(module)[name] = unpack(packed.data, expert_states(module)[name])


def _keep_linear(module: Linear4bit) -> None:
    """Replaces `forward` by the product with the kept weight, with the same conversions."""
    state = module.weight.quant_state
    weight = bnb.dequantize_4bit(module.weight.data, state)
    module.__dict__[_UNPACKED] = weight
    bias = None if module.bias is None else module.bias.to(weight.dtype)

    def forward(rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows.to(weight.dtype), weight, bias).to(rows.dtype)

    module.forward = forward
