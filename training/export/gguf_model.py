"""Writes a whole model as GGUF, from its Hugging Face folder: what llama.cpp, Ollama and LM Studio open.

The folder is read and written tensor by tensor, a large one in pieces. bfloat16 stays bit for bit what it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.events import ErrorCode
from training.export.gguf_families import Family, Place, refused
from training.export.gguf_file import TYPES, Entry, fitting_type, in_type, need_gguf, write_gguf
from training.export.gguf_parameters import add_parameters, position_factors
from training.export.gguf_vocabulary import add_vocabulary
from training.export.orders import OnBytes
from training.export.stored_tensors import Array, StoredTensor, in_float32, stored_tensors
from training.failures import TrainingFailed, in_brief
from training.files.model_folder import CONFIG, ModelFolder, open_model_folder

# Small and sensitive, or used by functions of llama.cpp that read only this type.
_IN_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")
# As much as is converted at once: 64 MiB in float32.
_PIECE_VALUES = 16 * 1024 * 1024


@dataclass(frozen=True)
class WrittenGguf:
    """A GGUF file on disk. `architecture` and `type` as llama.cpp names them. `lost_window`: see Family."""

    path: Path
    architecture: str
    type: str
    tensors: int
    bytes: int
    lost_window: int | None


@dataclass(frozen=True)
class _Part:
    """A published tensor and where it goes."""

    tensor: StoredTensor
    place: Place


def write_gguf_model(
    folder: Path, out: Path, *, type_: str | None = None, name: str | None = None, on_bytes: OnBytes = lambda *_: None
) -> WrittenGguf:
    """Writes the model in `folder` to `out`. `type_` is one of TYPES; by default bf16 stays bf16, all else is f16.

    `name` is what programs show. Raises TrainingFailed: model_unsupported for what llama.cpp would compute otherwise,
    model_incomplete for a folder that is not whole, invalid_spec without the package gguf."""
    need_gguf()
    refuse_unknown_type(type_)
    model = open_model_folder(folder, name or folder.name)
    if model.kept_copy is not None:
        raise TrainingFailed(
            ErrorCode.MODEL_UNSUPPORTED,
            "this folder keeps the model's 4-bit copy alone, in a form that llama.cpp does not read",
            "merge first: `brightrun-trainer export JOB --merged DIR`, then convert that folder",
        )
    family = family_of(model)
    parts = _parts(model, family)
    kind = _chosen_type(type_, parts)
    entries = [_entry(gguf_name, found, family, kind) for gguf_name, found in parts.items()]
    entries += [_factors(gguf_name, values) for gguf_name, values in position_factors(family).items()]

    def describe(writer: Any) -> None:
        import gguf

        writer.add_type("model")
        writer.add_file_type(int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_parameters(writer, family)
        tokenizer = add_vocabulary(writer, model, _rows_of_embeddings(entries))
        writer.add_name(_name_for(name or folder.name, tokenizer))

    size = write_gguf(out, family.name, describe, entries, on_bytes)
    return WrittenGguf(out, family.name, kind.lower(), len(entries), size, family.lost_window)


def refuse_unknown_type(asked: str | None) -> None:
    """Raises TrainingFailed(invalid_spec) for a type that is not written here."""
    if asked is not None and asked not in TYPES:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC,
            f"there is no GGUF type {asked[:40]!r} here",
            f"choose one of: {', '.join(TYPES)}; llama.cpp's llama-quantize makes the smaller ones from these",
        )


def family_of(model: ModelFolder) -> Family:
    """Returns the rules for a model. Its configuration is read as transformers reads it, with all defaults."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model.path)
    except (ValueError, KeyError, OSError) as error:
        raise refused(f"the model's {CONFIG} cannot be read: {in_brief(error)}") from error
    return Family.of(model.config.get("architectures"), config.get_text_config().to_dict())


def _parts(model: ModelFolder, family: Family) -> dict[str, list[_Part]]:
    """Returns what each tensor of the file is made of, in the order of the published files."""
    parts: dict[str, list[_Part]] = {}
    for tensor in stored_tensors(model.shards):
        for place in family.places(tensor.name):
            if not tensor.is_readable:
                raise refused(f"{tensor.name} is stored as {tensor.type}, which cannot be converted here")
            parts.setdefault(place.name, []).append(_Part(tensor, place))
    for name, found in parts.items():
        wanted = family.experts if found[0].place.expert not in (None, -1) else 1
        if len(found) != wanted:
            raise TrainingFailed(
                ErrorCode.MODEL_INCOMPLETE,
                f"{name} is made of {wanted} tensors, and the folder holds {len(found)} of them",
                "export or download the model again",
            )
        found.sort(key=lambda part: part.place.expert or 0)
    return parts


def _chosen_type(asked: str | None, parts: dict[str, list[_Part]]) -> str:
    if asked is not None:
        return asked.upper()
    values: Counter[str] = Counter()
    for found in parts.values():
        for part in found:
            values[part.tensor.type] += int(np.prod(part.tensor.shape, dtype=np.int64))
    return "BF16" if values and values.most_common(1)[0][0] == "BF16" else "F16"


def _entry(name: str, found: list[_Part], family: Family, wanted: str) -> Entry:
    first = found[0]
    shape = first.tensor.shape
    if first.place.expert == -1:
        shape = (shape[0], len(first.place.rows), *shape[2:]) if first.place.rows is not None else shape
    else:
        shape = (len(first.place.rows), *shape[1:]) if first.place.rows is not None else shape
        if first.place.expert is not None:
            shape = (family.experts, *shape)
    if name.endswith("ssm_conv1d.weight"):
        shape = (shape[0], shape[-1])
    kind = _type_of(name, shape, wanted)
    return Entry(name, shape, kind, lambda: _pieces(found, kind))


def _type_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    # llama.cpp reads vectors and norms in float32 only.
    if len(shape) <= 1 or name.endswith(("_norm.weight", *_IN_FLOAT32)) or not name.endswith(".weight"):
        return "F32"
    return fitting_type(shape, wanted)


def _pieces(found: list[_Part], kind: str) -> Iterator[Array]:
    for part in found:
        bits = part.tensor.bits()
        for matrix in bits if part.place.expert == -1 else (bits,):
            yield from _converted(matrix, part, kind)


def _converted(bits: Array, part: _Part, kind: str) -> Iterator[Array]:
    rows, stored = part.place.rows, part.tensor.type
    count = len(bits) if rows is None else len(rows)
    step = max(1, _PIECE_VALUES // max(1, bits[0].size))
    for begin in range(0, count, step):
        piece = bits[begin : begin + step] if rows is None else bits[rows[begin : begin + step]]
        if stored == kind and part.place.change is None:
            yield piece
            continue
        values = in_float32(piece, stored)
        yield in_type(part.place.change(values) if part.place.change else values, kind)


def _factors(name: str, values: Array) -> Entry:
    return Entry(name, values.shape, "F32", lambda: iter((values,)))


def _name_for(name: str, tokenizer: Any) -> str:
    """llama.cpp drops the space after special tokens if the model's *name* has phi-3 or phi3 in it, and crashes if such
    a model lacks Phi-3's words. So the name says it of tokenizers that do drop it, and of no other."""
    words = tokenizer.get_vocab()
    has_its_words = {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(words)
    if has_its_words and any(token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (phi-3)"
    return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


def _rows_of_embeddings(entries: list[Entry]) -> int:
    return next(entry.shape[0] for entry in entries if entry.name == "token_embd.weight")
