"""Writes an adapter as a GGUF LoRA: what llama.cpp adds to a base model's GGUF with `--lora`.

Only B's rows follow the base's; A is as trained. llama.cpp scales by alpha / rank, so any other scale goes into B.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.export.gguf_families import Family, Place, refused
from training.export.gguf_file import Entry, need_gguf, write_gguf
from training.export.gguf_model import WrittenGguf, family_of
from training.export.merging.deltas import ADAPTER_WEIGHTS, AdaptedLayer, Adapter, factor_name, read_adapter
from training.export.orders import OnBytes
from training.export.stored_tensors import Array, StoredTensor, in_float32, stored_tensors
from training.files.model_folder import ModelFolder, read_config


def write_gguf_adapter(
    base: Path, adapter: Path, out: Path, *, name: str | None = None, on_bytes: OnBytes = lambda *_: None
) -> WrittenGguf:
    """Writes the adapter in folder `adapter` to `out`, in float32, for a GGUF of `base` in any type.

    Of `base` only config.json is read. Raises TrainingFailed: model_unsupported for a layer that llama.cpp has no LoRA
    for, invalid_spec for an adapter that is no plain LoRA."""
    need_gguf()
    config = read_config(base)
    family = family_of(ModelFolder(base, config, ()))
    trained = read_adapter(adapter)
    entries = []
    for layer, a, b in _factors(trained):
        for place in _places(family, layer.module):
            # The trained scale, and llama.cpp's.
            factor = layer.scale / (trained.alpha / layer.rank)
            rows = b.shape[0] if place.rows is None else len(place.rows)
            entries.append(Entry(f"{place.name}.lora_a", a.shape, "F32", _values(a, None, 1.0)))
            entries.append(Entry(f"{place.name}.lora_b", (rows, b.shape[1]), "F32", _values(b, place.rows, factor)))

    def describe(writer: Any) -> None:
        import gguf

        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", trained.alpha)
        writer.add_name(name or adapter.name)
        writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if trained.base_model is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, trained.base_model)

    size = write_gguf(out, family.name, describe, entries, on_bytes)
    return WrittenGguf(out, family.name, "f32", len(entries), size, family.lost_window)


def _factors(trained: Adapter) -> Iterator[tuple[AdaptedLayer, StoredTensor, StoredTensor]]:
    """Yields each adapted layer with its A and B, where they lie in the file."""
    tensors = {tensor.name: tensor for tensor in stored_tensors((trained.folder / ADAPTER_WEIGHTS,))}
    for layer in trained.layers.values():
        a, b = (tensors[factor_name(layer.module, factor)] for factor in "AB")
        if not (a.is_readable and b.is_readable):
            raise refused(f"the adapter's layer {layer.module} is stored as {a.type} and {b.type}")
        yield layer, a, b


def _places(family: Family, module: str) -> list[Place]:
    places = family.places(f"{module}.weight")
    if not places or any(place.expert is not None for place in places):
        raise refused(f"llama.cpp applies no LoRA to {module}")
    return places


def _values(tensor: StoredTensor, rows: np.ndarray[Any, Any] | None, factor: float) -> Any:
    def pieces() -> Iterator[Array]:
        bits = tensor.bits()
        yield in_float32(bits if rows is None else bits[rows], tensor.type) * np.float32(factor)

    return pieces
