"""Computes an adapter's size from the shapes in the model's files, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from training.files.module_names import DEFAULT_TARGETS, may_be_adapted
from training.spec import Hyperparameters

# Adapters are trained and kept in float32.
ADAPTER_BYTES = 4


def adapter_parameters(tensors: Iterable[tuple[str, tuple[int, ...]]], chosen: Hyperparameters) -> int:
    """Counts LoRA weights: rank × (in + out) for each adapted linear layer of a block. Experts stay frozen."""
    targets = {target.rpartition(".")[2] for target in chosen.target_modules or DEFAULT_TARGETS}
    width = 0
    for name, shape in tensors:
        parts = name.split(".")
        if len(shape) == 2 and len(parts) > 1 and parts[-2] in targets and may_be_adapted(name):
            width += sum(shape)
    return chosen.lora_rank * width
