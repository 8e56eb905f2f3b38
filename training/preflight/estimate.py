"""Estimates a run from file headers and token counts: memory, disk, adapter size, time, cost.

The formulas are rough on purpose and err on the safe side. Where each number comes from:
- exact, and compared with loaded models by tests/training/preflight/test_estimate.py, with the shapes of real ones by
  tests/training/test_real_shapes.py: parameters, the weights' bytes, the adapter's parameters and bytes;
- activations: 34 bytes a token and hidden unit of a block in 16 bits (Korthikanti et al. 2022, "Reducing Activation
  Recomputation in Large Transformer Models", equation 2, without the attention matrix, which sdpa never stores), taken
  twice here: for gated feed-forwards and routed copies on a GPU, for float32 on a CPU. Not measured on a GPU yet;
- speed: 20 % of the bf16 peak of an A100 (312 TFLOP/s), the slowest GPU offered with 80 GB, and 50 GFLOP/s for two
  CPU cores, about what a float32 matrix product alone reaches there. A queue with a history replaces these by what
  earlier jobs took.
"""

from __future__ import annotations

import math
from collections import Counter
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
# What configs call the number of a layer's experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
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
    return math.prod(shape) * (NF4_BYTES if quantize and _is_packed(name, shape) else _KEPT_BYTES[compute_type])


def _is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """Returns True for the weights of linear layers and of fused experts in the model's blocks."""
    parts = name.split(".")
    module = parts[-2] if len(parts) > 1 else ""
    if parts[-1].endswith("bias") or not is_in_block(name) or module in (*UNQUANTISED_MODULES, *ROUTERS):
        return False
    return len(shape) == 2 or (len(shape) == 3 and "experts" in parts)


def estimate_run(spec: JobSpec, folder: ModelFolder, corpus: Corpus, plan: Plan) -> Estimate:
    """Estimates a run. Reads the headers of the weight files, not the weights."""
    tensors = tuple(folder.tensors())
    adapter = adapter_parameters(tensors, spec.hyperparameters)
    parameters = largest = vocabulary = 0
    experts_of: Counter[str] = Counter()
    stored = 0.0
    config = folder.text_config
    layers = folder.layer_count or 1
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1)
    for name, shape in tensors:
        count = math.prod(shape)
        parameters += count
        stored += _bytes_of(name, shape, spec.quantize, plan.compute_type)
        block, is_expert, _ = name.partition(".experts.")
        if is_expert:
            experts_of[block] += count
            continue
        largest = max(largest, count)
        if len(shape) == 2 and shape[1] == hidden and not is_in_block(name):
            # Not the config's: some leave out what equals their library's default.
            vocabulary = max(vocabulary, shape[0])
    expert_parameters = experts_of.total()
    tokens = plan.heaviest_tokens(corpus.max_length)
    # All experts of a layer are unpacked together.
    unpacked = 2 * max(largest, max(experts_of.values(), default=0))
    kept = layers * tokens * hidden * 2 * (1 if spec.device == "cuda" else _BLOCK_ACTIVATIONS)
    activations = kept + _BLOCK_ACTIVATIONS * tokens * hidden * 2 + unpacked + 3 * 4 * SLICE_TOKENS * vocabulary
    memory = int(stored) + adapter * _TRAINED_BYTES + activations + _OVERHEAD_BYTES[spec.device]
    experts = max(int(config.get(key) or 1) for key in _EXPERT_COUNTS)
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
