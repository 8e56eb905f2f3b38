"""What lies beside the weights of a merged model: the base's own files unchanged, its licence, a card, a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.adapter.tokenizer_files import for_transformers_4
from training.export.merging.deltas import ADAPTER_WEIGHTS, Adapter
from training.export.merging.merged_card import Origin, merged_card
from training.export.merging.unfinished_folder import UnfinishedFolder
from training.files.durable_files import sha256_of
from training.files.licence import licence_of
from training.files.model_folder import CONFIG, INDEX, ModelFolder

MANIFEST = "manifest.json"
README = "README.md"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Weights in any form, which the merged ones replace; what remains are small files of configuration.
_WEIGHTS = frozenset((
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".npz", ".npy", ".tflite", ".ot", ".mlmodel",
))  # fmt: skip
# Descriptions of weights in other forms. With `params.json` a server would look for Mistral's own form.
_NOT_COPIED = frozenset((README, INDEX, MANIFEST, "params.json"))
# A tokenizer with several chat templates keeps them in this folder.
_TEMPLATES = "additional_chat_templates"
_MOST_BYTES = 2**28


def write_beside_files(
    unfinished: UnfinishedFolder,
    folder: ModelFolder,
    adapter: Adapter,
    base_model: str,
    base_revision: str | None,
    *,
    is_dequantised: bool,
) -> None:
    """Copies the base's files, and writes template, card and manifest."""
    for name in sorted(files_to_copy(folder.path)):
        unfinished.write(name, (folder.path / name).read_bytes())
    if is_dequantised and "quantization_config" in folder.config:
        config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
        unfinished.write(CONFIG, json.dumps(config, indent=2) + "\n")
    tokenizer = _read(folder.path / TOKENIZER_CONFIG)
    if (readable := for_transformers_4(tokenizer)) != tokenizer:
        unfinished.write(TOKENIZER_CONFIG, json.dumps(readable, indent=2, ensure_ascii=False) + "\n")
    template = _template_of(adapter.folder)
    if template is not None and template != _template_of(folder.path):
        # What the adapter was trained with. Readers take this file before a template in tokenizer_config.json.
        unfinished.write(TEMPLATE, template)
    manifest = _read(adapter.folder / MANIFEST)
    serving = manifest.get("serving")
    origin = Origin(
        base_model=base_model,
        base_revision=base_revision,
        job_id=_text(manifest.get("job_id")),
        is_dequantised=is_dequantised,
        licence=licence_of(folder.path),
        serving=serving if isinstance(serving, dict) else {},
    )
    unfinished.write(README, merged_card(origin))
    facts = {
        "kind": "merged",
        "job_id": origin.job_id,
        "base_model": base_model,
        # Of the folder that was merged into, and of the training; null where nobody noted it.
        "base_model_revision": base_revision,
        "trained_on_revision": adapter.base_revision,
        "is_dequantised": is_dequantised,
        "adapter_sha256": sha256_of(adapter.folder / ADAPTER_WEIGHTS),
        "chat_template_kwargs": origin.serving.get("chat_template_kwargs") or {},
        "versions": {library: version(library) for library in ("brightrun-trainer", "torch", "transformers")},
    }
    files = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in unfinished.files.items()}
    unfinished.write(MANIFEST, json.dumps({"format": 1, **facts, "files": files}, indent=2, sort_keys=True) + "\n")


def files_to_copy(base: Path) -> Iterator[str]:
    """Yields the files that belong to the model and are not weights: config, tokenizer, templates, licence."""
    for entry in base.iterdir():
        if entry.name == _TEMPLATES and entry.is_dir():
            yield from (f"{_TEMPLATES}/{file.name}" for file in entry.glob("*.jinja"))
        elif (
            entry.is_file()
            and not entry.name.startswith(".")
            and entry.suffix not in _WEIGHTS
            and entry.name not in _NOT_COPIED
            and not entry.name.endswith((".index.json", ".part"))
            and entry.stat().st_size <= _MOST_BYTES
        ):
            yield entry.name


def _template_of(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder, wherever it is written; None if there is none, or several by name."""
    file = folder / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return _text(_read(folder / TOKENIZER_CONFIG).get("chat_template"))


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none: an adapter has no manifest before it is packed."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
