"""Reads an adapter and adds it to the weight of a linear layer: scale × B × A, some rows at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from training.events import ErrorCode
from training.failures import TrainingFailed, in_brief
from training.files.model_folder import read_header, tensors_in

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What would need other arithmetic than scale × B × A, and the value that means: not so. Jobs here use none of it.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    # Active after certain tokens only; chosen among several; summed over blocks; with singular values of its own.
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    # Others (PiSSA, OLoRA, LoftQ, …) change the base model's weights as well.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
}


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer with its place in the adapter: inputs, outputs and rank are the factors' shapes."""

    module: str
    inputs: int
    outputs: int
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: what it was trained on, and its layers by the module's path in the model."""

    folder: Path
    base_model: str | None
    base_revision: str | None
    layers: Mapping[str, AdaptedLayer]
    # The config's own; single layers may have another.
    alpha: float

    @contextmanager
    def opened(self) -> Iterator[Deltas]:
        # Not mmapped: mapped pages would count as ours.
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt", device="cpu", backend="pread") as file:
            yield Deltas(file)


class Deltas:
    """The factors of an open adapter, read when they are asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def of(self, layer: AdaptedLayer) -> Delta:
        """Reads both factors of a layer into memory."""
        try:
            a_RI, b_OR = (self._file.get_tensor(factor_name(layer.module, factor)).float() for factor in "AB")
        except SafetensorError as error:
            raise _refused(f"{ADAPTER_WEIGHTS} is damaged ({in_brief(error)})") from error
        return Delta(a_RI, b_OR, layer.scale)


@dataclass(frozen=True)
class Delta:
    """What is added to one weight."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float

    def added_to(self, block: torch.Tensor, begin: int) -> torch.Tensor:
        """Rows of the weight, from `begin` on, plus those of scale × B × A: in float32 (float64 for weights stored so),
        rounded once to the type of the weight."""
        wide = torch.promote_types(block.dtype, torch.float32)
        rows_OR = self.b_OR[begin : begin + block.shape[0]].to(wide)
        return block.to(wide, copy=True).addmm_(rows_OR, self.a_RI.to(wide), alpha=self.scale).to(block.dtype)


def factor_name(module: str, factor: str) -> str:
    """The name of a layer's A or B in the adapter's file."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def read_adapter(folder: Path) -> Adapter:
    """Reads config and header. Raises TrainingFailed(invalid_spec) for what is no LoRA adapter, or not a plain one."""
    config = _read_config(folder)
    if config.get("peft_type") != "LORA":
        raise _refused(f"it is of the kind {config.get('peft_type')!r}, and only LoRA adapters can be exported")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise _refused(f"its {ADAPTER_CONFIG} has {key} = {json.dumps(config[key])[:80]}: it is no plain LoRA")
    try:
        shapes = {
            name: tuple(int(size) for size in entry["shape"])
            for name, entry in tensors_in(read_header(folder / ADAPTER_WEIGHTS)).items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(f"{ADAPTER_WEIGHTS} cannot be read ({type(error).__name__})") from error
    layers = dict(_layers(shapes, config))
    if not layers:
        raise _refused(f"{ADAPTER_WEIGHTS} has no tensors")
    base = config.get("base_model_name_or_path")
    named = base if isinstance(base, str) and base else None
    return Adapter(folder, named, config.get("revision"), layers, _number(config.get("lora_alpha")))


def _layers(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Iterator[tuple[str, AdaptedLayer]]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        factor = _FACTOR.fullmatch(name)
        if factor is None or len(shape) != 2:
            raise _refused(f"its tensor {name} of shape {shape} is not a factor of a linear layer")
        found.setdefault(factor[1], {})[factor[2]] = shape
    for module, factors in found.items():
        if factors.keys() != {"A", "B"} or factors["A"][0] != factors["B"][1]:
            raise _refused(f"its factors of {module} do not belong together")
        rank = factors["A"][0]
        scale = _alpha(module, config) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        yield module, AdaptedLayer(module, factors["A"][1], factors["B"][0], rank, scale)


def _alpha(module: str, config: Mapping[str, Any]) -> float:
    """lora_alpha, or the first of alpha_pattern that fits, as PEFT chooses it."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    return _number(
        next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), config.get("lora_alpha"))
    )


def _number(alpha: object) -> float:
    if not isinstance(alpha, int | float) or alpha == 0:
        raise _refused(f"its {ADAPTER_CONFIG} has lora_alpha = {alpha!r}")
    return float(alpha)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(f"{ADAPTER_CONFIG} cannot be read ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise _refused(f"{ADAPTER_CONFIG} is not a JSON object")
    return config


def _refused(why: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.INVALID_SPEC,
        f"the adapter cannot be exported: {why}",
        "export the adapter of a completed job, as `brightrun-trainer download` unpacks it",
    )
