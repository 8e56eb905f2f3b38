"""Decides which weights of a model must be in four bits, and which stay in sixteen on purpose.

The decision depends on what a weight does, not on its size: the router of a large mixture has more numbers than many
a linear layer, and is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.module_names import OTHER_SENSES, UNQUANTISED_MODULES
from training.quantization.experts import has_fused_experts

# The purpose of a weight outside linear layers and experts is unknown; leaving a small one in 16 bits does no harm.
_LARGE_WEIGHT = 1 << 20

# Module, name of the weight in it, path in the model.
IsPacked = Callable[[torch.nn.Module, str, str], bool]


def is_in_bytes(module: torch.nn.Module, name: str, _path: str) -> bool:
    """Returns True if this weight of a loaded model was packed."""
    parameter = module._parameters[name]
    return parameter is not None and parameter.dtype is torch.uint8


def refuse_what_is_left(model: Any, name: str, is_packed: IsPacked) -> None:
    """Raises TrainingFailed(model_unsupported) if a weight that should be in four bits stays in 16."""
    left = list(left_in_16_bits(model, is_packed))
    if not left:
        return
    total = sum(numel for _, numel in left)
    raise TrainingFailed(
        ErrorCode.MODEL_UNSUPPORTED,
        f"{len(left)} weights of {name} did not become 4-bit ({total / 1e9:.4f} billion parameters, first "
        f"{left[0][0]}); it would need {total * 2 / 2**30:.1f} GiB more than planned",
        "choose another base model, or report this architecture to the operator",
    )


def left_in_16_bits(model: Any, is_packed: IsPacked) -> Iterator[tuple[str, int]]:
    """Finds weights that should have been packed: of linear layers, of experts, and unknown large ones. Path and size.

    Kept on purpose: embeddings and head, routers, convolutions, and those named in UNQUANTISED_MODULES or by the
    architecture itself, which knows what must stay exact. Of a part that sees or hears only the linear layers are
    packed: the rest is small, and no text passes through it.
    """
    kept_names = {*UNQUANTISED_MODULES, *(model._keep_in_fp32_modules or ())}
    kept = {
        id(parameter)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
        for parameter in layer.parameters()
    } | {id(parameter) for parameter in _routers(model)}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.modules.conv._ConvNd):
            continue
        if not kept_names.isdisjoint(path.split(".")):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or id(parameter) in kept or name in kept_names:
                continue
            full = f"{path}.{name}"
            if _must_be_packed(module, name, parameter, path) and not is_packed(module, name, full):
                yield full, math.prod(parameter.shape)


def _must_be_packed(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter, path: str) -> bool:
    if isinstance(module, torch.nn.Linear | Conv1D):
        return True
    parts = path.split(".")
    if name.endswith("bias") or not set(OTHER_SENSES).isdisjoint(parts):
        return False
    return (parameter.dim() > 2 and "experts" in parts) or parameter.numel() >= _LARGE_WEIGHT


def _routers(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Finds routers: they have one row for each of the experts beside them."""
    for block in model.modules():
        counts = {count for child in block.children() if (count := _experts_in(child)) is not None}
        if not counts:
            continue
        for child in block.children():
            if _experts_in(child) is None:
                yield from (p for p in child.parameters() if p.dim() == 2 and p.shape[0] in counts)


def _experts_in(module: torch.nn.Module) -> int | None:
    return int(getattr(module, "num_experts")) if has_fused_experts(module) else None  # noqa: B009 - not a Module's own
