"""What lies beside the weights of a merged model: the base's own files unchanged, its licence, a card, a manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.export.deltas import Adapter
from training.export.unfinished_folder import UnfinishedFolder
from training.files.model_folder import CONFIG, INDEX, ModelFolder

MANIFEST = "manifest.json"
README = "README.md"
TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
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
_LICENSE_LINE = re.compile(r"^license(?:_name|_link)?:\s*\S.*$", re.MULTILINE)


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
    template = _template_of(adapter.folder)
    if template is not None and template != _template_of(folder.path):
        # What the adapter was trained with. Readers take this file before a template in tokenizer_config.json.
        unfinished.write(TEMPLATE, template)
    facts = {
        "kind": "merged",
        "base_model": base_model,
        "base_model_revision": base_revision or adapter.base_revision,
        "is_dequantised": is_dequantised,
        "adapter": _about(adapter.folder),
        "versions": {library: version(library) for library in ("brightrun-trainer", "torch", "transformers")},
    }
    unfinished.write(README, _card(facts, folder.path))
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
    try:
        found = json.loads((folder / _TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _about(adapter: Path) -> dict[str, Any]:
    """Which adapter it was, as far as its own manifest says."""
    try:
        manifest = json.loads((adapter / MANIFEST).read_text(encoding="utf-8"))
        return {
            "job_id": manifest.get("job_id"),
            "sha256": manifest["files"]["adapter_model.safetensors"]["sha256"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _card(facts: dict[str, Any], base: Path) -> str:
    name, revision = facts["base_model"], facts["base_model_revision"]
    head = [f"base_model: {name}", "base_model_relation: finetune", "library_name: transformers", *_license_of(base)]
    at = f" at the revision `{revision}`" if revision else ""
    job = facts["adapter"].get("job_id")
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# {name.rpartition('/')[2]}, fine-tuned",
        "",
        f"The weights of [{name}](https://huggingface.co/{name}){at} with a LoRA adapter merged into them"
        + (f" (job `{job}`)." if job else "."),
        "The layout is the base model's, file by file: whatever opens the base opens this.",
        "",
    ]
    if facts["is_dequantised"]:
        lines += [
            "**These weights were in 4 bits.** Only the 4-bit copy (NF4) of the base was kept where this was made, so",
            "its weights were unpacked: they are those that the adapter was trained on, and as far from the published",
            "ones as 4 bits are. A merge into the published weights needs those: `brightrun-trainer models pull`.",
            "Layers for speculative decoding (`mtp`) that the base may have are not here.",
            "",
        ]
    lines += [
        "Serve it:",
        "",
        "```sh",
        "vllm serve FOLDER",
        "```",
        "",
        "`manifest.json` has the size and SHA-256 of each file. The base model's licence applies.",
        "",
    ]
    return "\n".join(lines)


def _license_of(base: Path) -> list[str]:
    """The lines about the licence at the head of the base model's own card."""
    try:
        text = (base / README).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    head = text[4:].partition("\n---")[0] if text.startswith("---\n") else ""
    return _LICENSE_LINE.findall(head)
