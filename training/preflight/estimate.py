"""Estimates a run from file headers and token counts: memory, disk, adapter size, time, cost.

The formulas are rough on purpose and err on the safe side. Where each number comes from:
- exact, and compared with loaded models by tests/training/preflight/test_estimate.py: parameters, the weights' bytes,
  the adapter's parameters and bytes;
- activations: 34 bytes a token and hidden unit of a block in 16 bits (Korthikanti et al. 2022, "Reducing Activation
  Recomputation in Large Transformer Models", equation 2, without the attention matrix, which sdpa never stores), taken
  twice here: for gated feed-forwards and routed copies on a GPU, for float32 on a CPU. Not measured on a GPU yet;
- speed: 20 % of the bf16 peak of an A100 (312 TFLOP/s), the slowest GPU offered with 80 GB, and 50 GFLOP/s for two
  CPU cores, about what a float32 matrix product alone reaches there. A queue with a history replaces these by what
  earlier jobs took.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from training.compute import ComputeType
from training.data.corpus import Corpus
from training.data.plan import Plan
from training.files.adapter_size import ADAPTER_BYTES, adapter_parameters
from training.files.model_folder import ModelFolder
from training.files.module_names import ROUTERS, UNQUANTISED_MODULES, is_in_block
from training.spec import JobSpec

# NF4 with double quantisation: half a byte, one byte a block of 64, four bytes a block of 64 × 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# float32 weight, gradient and Adam's two moments.
_TRAINED_BYTES = 16
# One transformer block's own activations while it is recomputed, in units of tokens × hidden size × 2 bytes (above).
_BLOCK_ACTIVATIONS = 34
# training.loop.loss uses slices of this size; it needs torch and cannot be imported here. A test compares the two.
SLICE_TOKENS = 1024
# Libraries, kernel workspaces, fragmentation: twice what a CUDA context with its kernels takes (0.5 to 1 GiB).
_OVERHEAD_BYTES = {"cuda": 2 * 2**30, "cpu": 2**29}
# Sustained floating-point operations per second (above).
_FLOPS = {"cuda": 62e12, "cpu": 50e9}
# Unquantised weights have the type that is computed in.
_KEPT_BYTES: dict[ComputeType, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and dollars. `memory_bytes` is the GPU's (the host's on a CPU)."""

    parameters: int
    model_bytes: int
    adapter_parameters: int
    adapter_bytes: int
    activation_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float
    cost: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def model_bytes(folder: ModelFolder, *, quantize: bool, compute_type: ComputeType) -> int:
    """Returns the memory that a base model's weights take once loaded."""
    return int(sum(_bytes_of(name, shape, quantize, compute_type) for name, shape in folder.tensors()))


def _bytes_of(name: str, shape: tuple[int, ...], quantize: bool, compute_type: ComputeType) -> float:
    parts = name.split(".")
    module = parts[-2] if len(parts) > 1 else ""
    quantised = quantize and len(shape) >= 2 and is_in_block(name) and module not in (*UNQUANTISED_MODULES, *ROUTERS)
    return math.prod(shape) * (NF4_BYTES if quantised else _KEPT_BYTES[compute_type])


def estimate_run(spec: JobSpec, folder: ModelFolder, corpus: Corpus, plan: Plan) -> Estimate:
    """Estimates a run. Reads the headers of the weight files, not the weights."""
    tensors = tuple(folder.tensors())
    adapter = adapter_parameters(tensors, spec.hyperparameters)
    parameters = expert_parameters = largest = 0
    stored = 0.0
    for name, shape in tensors:
        count = math.prod(shape)
        parameters += count
        stored += _bytes_of(name, shape, spec.quantize, plan.compute_type)
        is_expert = "experts" in name.split(".")
        expert_parameters += count if is_expert else 0
        largest = max(largest, count if not is_expert else 0)
    config = folder.text_config
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1)
    vocabulary = int(config.get("vocab_size") or 1)
    tokens = plan.heaviest_tokens(corpus.max_length)
    # All experts of a layer are unpacked together.
    unpacked = 2 * max(largest, expert_parameters // layers)
    kept = layers * tokens * hidden * 2 * (1 if spec.device == "cuda" else _BLOCK_ACTIVATIONS)
    activations = kept + _BLOCK_ACTIVATIONS * tokens * hidden * 2 + unpacked + 3 * 4 * SLICE_TOKENS * vocabulary
    memory = int(stored) + adapter * _TRAINED_BYTES + activations + _OVERHEAD_BYTES[spec.device]
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 1)
    chosen = int(config.get("num_experts_per_tok") or 1)
    active = parameters - expert_parameters + expert_parameters * min(1.0, chosen / experts)
    # Forward and the gradient of the inputs: 2 + 2 per weight; 2 more if activations are recomputed.
    per_token = active * (6 if spec.device == "cuda" else 4)
    passes = corpus.train_tokens + corpus.validation_tokens / 2
    # Ranks share the cores of a CPU host; GPUs add up.
    cards = plan.ranks if spec.device == "cuda" else 1
    seconds = plan.epochs * passes * per_token / (_FLOPS[spec.device] * cards)
    cost = spec.cost_per_hour * seconds / 3600 if spec.cost_per_hour is not None else None
    return Estimate(
        parameters=parameters,
        model_bytes=int(stored),
        adapter_parameters=adapter,
        adapter_bytes=adapter * ADAPTER_BYTES,
        activation_bytes=activations,
        memory_bytes=memory,
        # Three checkpoints (two kept, one being written), each with weights, best weights and two moments; the adapter.
        disk_bytes=3 * adapter * 16 + adapter * ADAPTER_BYTES + 64 * 2**20,
        seconds=seconds,
        cost=cost,
    )
