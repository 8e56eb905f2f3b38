"""What a run will need, computed from file headers and token counts: memory, disk, adapter size, time, cost.

The formulas are rough on purpose and err to the safe side; what was measured against them is in the benchmarks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from training.corpus import Corpus
from training.folder import ModelFolder
from training.plan import Plan
from training.spec import JobSpec
from training.targets import DEFAULT_TARGETS, ROUTERS, UNQUANTISED_MODULES

# NF4 with double quantisation: half a byte, one byte a block of 64, four bytes a block of 64 × 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_BLOCK_NAMES = ("layers", "h", "blocks")
# float32 weight, gradient and Adam's two moments.
_TRAINED_BYTES = 16
# One transformer block's own activations while it is recomputed, in units of tokens × hidden size × 2 bytes.
_BLOCK_ACTIVATIONS = 34
_SLICE_TOKENS = 1024
# Libraries, kernels' workspaces, fragmentation.
_OVERHEAD_BYTES = {"cuda": 2 * 2**30, "cpu": 2**29}
# Sustained multiplications: 20 % of an H100's bf16 peak, and of an A100's about 45 %; two cores of a small server.
_FLOPS = {"cuda": 140e12, "cpu": 50e9}


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and dollars. `memory_bytes` is the card's (the host's on a CPU)."""

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


def estimate_run(spec: JobSpec, folder: ModelFolder, corpus: Corpus, plan: Plan) -> Estimate:
    """Look ahead. Reads the headers of the weight files, not the weights."""
    rank = spec.hyperparameters.lora_rank
    targets = spec.hyperparameters.target_modules or DEFAULT_TARGETS
    parameters = expert_parameters = adapter = largest = 0
    stored = 0.0
    for name, shape in folder.tensors():
        count = math.prod(shape)
        parameters += count
        parts = name.split(".")
        module = parts[-2] if len(parts) > 1 else ""
        in_block = any(part in _BLOCK_NAMES for part in parts)
        quantised = spec.quantize and len(shape) >= 2 and in_block and module not in (*UNQUANTISED_MODULES, *ROUTERS)
        stored += count * (NF4_BYTES if quantised else 2)
        is_expert = "experts" in parts
        expert_parameters += count if is_expert else 0
        largest = max(largest, count if not is_expert else 0)
        if in_block and not is_expert and len(shape) == 2 and any(module == t.split(".")[-1] for t in targets):
            adapter += rank * sum(shape)
    config = folder.text_config
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1)
    vocabulary = int(config.get("vocab_size") or 1)
    tokens = plan.micro_batch * corpus.max_length
    # A layer's experts are unpacked together.
    unpacked = 2 * max(largest, expert_parameters // layers)
    kept = layers * tokens * hidden * 2 * (1 if spec.device == "cuda" else _BLOCK_ACTIVATIONS)
    activations = kept + _BLOCK_ACTIVATIONS * tokens * hidden * 2 + unpacked + 3 * 4 * _SLICE_TOKENS * vocabulary
    memory = int(stored) + adapter * _TRAINED_BYTES + activations + _OVERHEAD_BYTES[spec.device]
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 1)
    chosen = int(config.get("num_experts_per_tok") or 1)
    active = parameters - expert_parameters + expert_parameters * min(1.0, chosen / experts)
    # Forward and back to the inputs: 2 + 2 a weight; once more forward where activations are recomputed.
    per_token = active * (6 if spec.device == "cuda" else 4)
    passes = corpus.train_tokens + corpus.validation_tokens / 2
    seconds = plan.epochs * passes * per_token / _FLOPS[spec.device]
    cost = spec.cost_per_hour * seconds / 3600 if spec.cost_per_hour is not None else None
    return Estimate(
        parameters=parameters,
        model_bytes=int(stored),
        adapter_parameters=adapter,
        adapter_bytes=adapter * 4,
        activation_bytes=activations,
        memory_bytes=memory,
        # Two checkpoints and one in the making, each weights, best weights and two moments; and the adapter.
        disk_bytes=3 * adapter * 16 + adapter * 4 + 64 * 2**20,
        seconds=seconds,
        cost=cost,
    )
