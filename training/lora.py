"""Where the adapter goes: linear layers found in the module tree, never the router, never fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import peft.utils.transformers_weight_conversion as peft_conversion
import torch
from peft import LoraConfig, get_peft_model

from training.events import ErrorCode
from training.failures import TrainingFailed
from training.spec import Hyperparameters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Linear layers of a decoder block by the names that transformers gives them. Left of these stand attention and
# feed-forward of dense models; in_proj_qkvz and out_proj are Gated DeltaNet's.
DEFAULT_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "in_proj_qkvz",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "qkv_proj",
    "gate_up_proj",
    "dense",
    "query_key_value",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "c_attn",
    "c_proj",
    "c_fc",
    "fc1",
    "fc2",
)
# A router decides which experts see a token; trained with a few hundred conversations it only forgets.
_ROUTERS = ("gate", "router", "shared_expert_gate")


def attach_adapter(model: PreTrainedModel, chosen: Hyperparameters) -> PeftModel:
    """Wrap the frozen model with float32 LoRA weights, seeded. Raises TrainingFailed(invalid_spec) for bad targets."""
    targets = choose_targets(model, chosen.target_modules)
    config = LoraConfig(
        r=chosen.lora_rank,
        lora_alpha=chosen.effective_lora_alpha,
        lora_dropout=chosen.lora_dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        bias="none",
    )
    torch.manual_seed(chosen.seed)
    with _targets_taken_literally():
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def choose_targets(model: PreTrainedModel, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names for LoraConfig, as suffixes of module paths, each of which exists in this model."""
    found = _suffixes(model)
    if asked is None:
        targets = tuple(sorted(suffix for suffix in found if suffix.rpartition(".")[2] in DEFAULT_TARGETS))
        if not targets:
            raise TrainingFailed(
                ErrorCode.MODEL_UNSUPPORTED,
                "no layer with a known name was found to put LoRA on",
                f"give target_modules; this model has {', '.join(sorted(found)[:20])}",
            )
        return targets
    targets_asked: list[str] = []
    for name in asked:
        leaf = name.rpartition(".")[2]
        if leaf in _ROUTERS:
            raise _bad_target(f"{name} is a router, which is never trained")
        if name == "experts" or ".experts" in f".{name}":
            raise _bad_target("the experts themselves cannot be adapted yet; they stay frozen in 4 bits")
        matching = [suffix for suffix in found if suffix == name or suffix.endswith(f".{name}")]
        if not matching:
            raise _bad_target(f"no linear layer of this model is called {name}; it has {', '.join(sorted(found)[:20])}")
        targets_asked += matching
    return tuple(sorted(set(targets_asked)))


def trainable_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _suffixes(model: PreTrainedModel) -> set[str]:
    """Paths of linear layers inside the repeated blocks, without the block's number: `self_attn.q_proj`."""
    found = set()
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        parts = path.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        if not numbers or parts[-1] in _ROUTERS:
            continue
        found.add(".".join(parts[numbers[-1] + 1 :]))
    return found


@contextmanager
def _targets_taken_literally() -> Iterator[None]:
    """Keep PEFT from rewriting gate/up/down_proj of a mixture model to its fused experts (peft issue 3711).

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
        f"target_modules: {message}",
        "leave target_modules out to adapt attention and feed-forward layers",
    )
