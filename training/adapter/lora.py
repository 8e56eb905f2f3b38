"""Chooses the linear layers that the adapter adapts, from the module tree: never a router, never fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import peft.utils.transformers_weight_conversion as peft_conversion
import torch
from peft import LoraConfig, get_peft_model

from training.adapter.frozen_linear import use_one_function
from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.module_names import DEFAULT_TARGETS, OTHER_SENSES, ROUTERS, may_be_adapted
from training.spec import Hyperparameters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach_adapter(model: PreTrainedModel, chosen: Hyperparameters) -> PeftModel:
    """Wraps the frozen model with seeded float32 LoRA weights. Raises TrainingFailed(invalid_spec) for bad targets."""
    targets = choose_targets(model, chosen.target_modules)
    config = LoraConfig(
        r=chosen.lora_rank,
        lora_alpha=chosen.effective_lora_alpha,
        lora_dropout=chosen.lora_dropout,
        target_modules=list(targets),
        exclude_modules=_outside_of_the_language_model(model),
        task_type="CAUSAL_LM",
        bias="none",
    )
    torch.manual_seed(chosen.seed)
    with targets_taken_literally():
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    use_one_function(adapted)
    return adapted


def choose_targets(model: PreTrainedModel, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns names for LoraConfig, each matching at least one linear layer of this model and no router.

    On a model with fused experts `gate_proj`, `up_proj`, `down_proj` mean the shared expert; the experts stay frozen.
    """
    found = _linear_layers(model)
    if asked is None:
        targets = tuple(sorted({path.rpartition(".")[2] for path in found} & set(DEFAULT_TARGETS)))
        if not targets:
            raise TrainingFailed(
                ErrorCode.MODEL_UNSUPPORTED,
                "no layer with a known name was found to put LoRA on",
                f"give target_modules; this model has {_names(found)}",
            )
        return targets
    for name in asked:
        if name.rpartition(".")[2] in ROUTERS:
            raise _bad_target(f"{name} is a router, which is never trained")
        if "experts" in name.split("."):
            raise _bad_target(f"{name}: the experts themselves cannot be adapted yet; they stay frozen in 4 bits")
        if not any(path == name or path.endswith(f".{name}") for path in found):
            raise _bad_target(f"no linear layer of this model is called {name}; it has {_names(found)}")
    return tuple(sorted(set(asked)))


def trainable_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _linear_layers(model: PreTrainedModel) -> set[str]:
    """Returns the paths of linear layers inside the repeated blocks, without the block number: `self_attn.q_proj`."""
    found = set()
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        parts = path.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        if numbers and parts[-1] not in ROUTERS and may_be_adapted(path):
            found.add(".".join(parts[numbers[-1] + 1 :]))
    return found


def _outside_of_the_language_model(model: PreTrainedModel) -> str | None:
    """Returns a pattern of the modules that PEFT must pass over, since their layers are called like those adapted.

    A vision tower has a q_proj too, and so may each expert where they are single layers. No text reaches the first, and
    the second would make the adapter a hundred times larger.
    """
    parts = {
        part
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not may_be_adapted(path)
        for part in path.split(".")
    } & {*OTHER_SENSES, "experts"}
    return rf"(?:.*\.)?(?:{'|'.join(sorted(parts))})\..*" if parts else None


def _names(paths: set[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths})[:20])


@contextmanager
def targets_taken_literally() -> Iterator[None]:
    """Keeps PEFT from rewriting gate/up/down_proj of a mixture model to its fused experts (peft issue 3711).

    The rewriting would train 3.4 billion expert parameters instead of the shared expert's few million.
    """
    original = peft_conversion.convert_peft_config_for_transformers
    peft_conversion.convert_peft_config_for_transformers = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        peft_conversion.convert_peft_config_for_transformers = original


def _bad_target(message: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.INVALID_SPEC,
        f"target_modules is not valid: {message}",
        "leave target_modules out to adapt attention and feed-forward layers",
    )
