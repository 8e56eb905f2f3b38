"""Writes an adapter as a GGUF LoRA: what llama.cpp adds to a base model's GGUF with `--lora`.

Only B's rows follow the base's; A is as trained. llama.cpp scales by alpha / rank, so any other scale goes into B.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.events import ErrorCode
from training.export.gguf_families import Family, Place, refused
from training.export.gguf_file import Entry, need_gguf, write_gguf
from training.export.gguf_model import WrittenGguf, family_of
from training.export.orders import OnBytes
from training.export.stored_tensors import Array, StoredTensor, in_float32, stored_tensors
from training.failures import TrainingFailed
from training.files.model_folder import ModelFolder, read_config

_HALF = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.lora_([AB])(?:\.default)?(?:\.weight)?")
MERGE_INSTEAD = "export the merged model: `brightrun-trainer export JOB --gguf FILE --gguf-form merged`"


def write_gguf_adapter(
    base: Path, adapter: Path, out: Path, *, name: str | None = None, on_bytes: OnBytes = lambda *_: None
) -> WrittenGguf:
    """Writes the adapter in folder `adapter` to `out`, in float32, for a GGUF of `base` in any type.

    Of `base` only config.json is read. Raises TrainingFailed(model_unsupported) for an adapter that llama.cpp would
    apply in part or otherwise."""
    need_gguf()
    config = read_config(base)
    family = family_of(ModelFolder(base, config, ()))
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    _refuse_what_llama_cpp_would_drop(settings)
    alpha = float(settings["lora_alpha"])
    entries = []
    for module, (a, b) in _pairs(adapter).items():
        for place in _places(family, module):
            # llama.cpp's scale, and the trained one.
            factor = _scale(settings, module, a.shape[0]) / (alpha / a.shape[0])
            rows = b.shape[0] if place.rows is None else len(place.rows)
            entries.append(Entry(f"{place.name}.lora_a", a.shape, "F32", _values(a, None, 1.0)))
            entries.append(Entry(f"{place.name}.lora_b", (rows, b.shape[1]), "F32", _values(b, place.rows, factor)))

    def describe(writer: Any) -> None:
        import gguf

        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(name or adapter.name)
        writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if base_name := settings.get("base_model_name_or_path"):
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, str(base_name))

    size = write_gguf(out, family.name, describe, entries, on_bytes)
    return WrittenGguf(out, family.name, "f32", len(entries), size, family.lost_window)


def _refuse_what_llama_cpp_would_drop(settings: dict[str, Any]) -> None:
    given = {
        "DoRA's magnitudes": settings.get("use_dora"),
        "trained biases": settings.get("lora_bias") or settings.get("bias", "none") != "none",
        "whole trained layers (modules_to_save)": settings.get("modules_to_save"),
        "trained token embeddings": settings.get("trainable_token_indices"),
        f"an adapter of the kind {settings.get('peft_type')}": settings.get("peft_type") != "LORA",
    }
    found = [what for what, is_there in given.items() if is_there]
    if found:
        raise TrainingFailed(ErrorCode.MODEL_UNSUPPORTED, f"a GGUF LoRA cannot carry {', '.join(found)}", MERGE_INSTEAD)


def _pairs(adapter: Path) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Returns A and B of each adapted module, by the module's path in the base model."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    for tensor in stored_tensors((adapter / "adapter_model.safetensors",)):
        found = _HALF.fullmatch(tensor.name)
        if found is None or len(tensor.shape) != 2 or not tensor.is_readable:
            raise TrainingFailed(
                ErrorCode.MODEL_UNSUPPORTED, f"a GGUF LoRA cannot carry the adapter's {tensor.name}", MERGE_INSTEAD
            )
        halves.setdefault(found[1], {})[found[2]] = tensor
    lacking = [module for module, both in halves.items() if set(both) != {"A", "B"}]
    if lacking or not halves:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC,
            f"the adapter is incomplete: A or B is missing of {', '.join(lacking[:3]) or 'every layer'}",
            "fetch the job's adapter again",
        )
    return {module: (both["A"], both["B"]) for module, both in halves.items()}


def _places(family: Family, module: str) -> list[Place]:
    places = family.places(f"{module}.weight")
    if not places or any(place.expert is not None for place in places):
        raise refused(f"llama.cpp applies no LoRA to {module}")
    return places


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scale of one module: alpha / rank, or alpha / √rank; single modules may have an alpha of their own."""
    alpha = float(settings["lora_alpha"])
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", module):
            alpha = float(own)
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _values(tensor: StoredTensor, rows: np.ndarray[Any, Any] | None, factor: float) -> Any:
    def pieces() -> Iterator[Array]:
        bits = tensor.bits()
        yield in_float32(bits if rows is None else bits[rows], tensor.type) * np.float32(factor)

    return pieces
