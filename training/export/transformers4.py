"""Writes an adapter's folder for transformers 4 and PEFT before 0.19, where it must differ.

In transformers 4 each expert of a mixture is modules of its own, and PEFT of that time rewrites no names: so the layers
of a shared expert are plain `target_modules` there, as in a dense model, and every PEFT from 0.12 on opens them. From
PEFT 0.19 with transformers 5 on they must be `target_parameters`, which is how an adapter is saved. The weights are the
same file. Adapters saved by earlier versions of this service also get their tokenizer's config and their numbers right.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.adapter.readers import KNOWN_KEYS
from training.adapter.tokenizer_files import for_transformers_4
from training.events import ErrorCode
from training.export.merging.deltas import ADAPTER_CONFIG, read_adapter
from training.export.orders import OnBytes
from training.failures import TrainingFailed
from training.files.durable_files import beside, put_in_place, sha256_of
from training.files.module_names import in_block
from training.results.model_card import CARD

_TOKENIZER_CONFIG = "tokenizer_config.json"
_MANIFEST = "manifest.json"
_FLOORS = re.compile(r'"peft>=[^"]*" "transformers>=[^"]*"')
_READERS = '"peft>=0.12,<0.19" "transformers>=4.57,<5"'
_REFUSED_BY_LATER_ONES = 0.05
# What a later PEFT writes for an option that is not used.
_UNUSED: tuple[Any, ...] = (None, False, [], {}, "")


def export_transformers4(request: Mapping[str, Any], on_bytes: OnBytes) -> dict[str, Any]:
    """The export `transformers4`. Request: adapter, into (folders)."""
    adapter, into = Path(request["adapter"]), Path(request["into"])
    changed = write_for_transformers4(adapter, into)
    paths = [file for file in sorted(into.rglob("*")) if file.is_file()]
    total = sum(file.stat().st_size for file in paths)
    files = {
        file.relative_to(into).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in paths
    }
    on_bytes(total, total)
    return {"path": str(into), "changed": changed, "bytes": total, "files": files}


def write_for_transformers4(adapter: Path, into: Path) -> list[str]:
    """Writes the folder `into` and returns the names of the files that differ; [] if the adapter opens as it is.

    Raises TrainingFailed(invalid_spec) if it is no LoRA adapter, or `into` is there already."""
    layers = read_adapter(adapter).layers
    if into.exists() or into.is_symlink():
        raise TrainingFailed(ErrorCode.INVALID_SPEC, f"{into} exists already", "name a new folder")
    into.parent.mkdir(parents=True, exist_ok=True)
    with beside(into) as staging:
        shutil.copytree(adapter, staging, ignore=shutil.ignore_patterns(".*"))
        changed = [
            name
            for name, rewritten in (
                (ADAPTER_CONFIG, _config(_read(staging / ADAPTER_CONFIG), list(layers))),
                (_TOKENIZER_CONFIG, for_transformers_4(_read(staging / _TOKENIZER_CONFIG))),
            )
            if _rewrite(staging / name, rewritten)
        ]
        card = staging / CARD
        if ADAPTER_CONFIG in changed and card.is_file():
            text = card.read_text(encoding="utf-8")
            if (told := _FLOORS.sub(_READERS, text)) != text:
                card.write_text(told, encoding="utf-8")
                changed.append(CARD)
        if changed and (staging / _MANIFEST).is_file():
            _rewrite(staging / _MANIFEST, _manifest(staging, changed))
        put_in_place(staging, into)
    return changed


def _config(config: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """Returns adapter_config.json for PEFT 0.12 to 0.18."""
    written = {key: value for key, value in config.items() if key in KNOWN_KEYS or value not in _UNUSED}
    if written.pop("target_parameters", None):
        # What is in the file is what was trained: `mlp.shared_expert.up_proj` ends no path of a routed expert.
        written["target_modules"] = sorted({in_block(module) for module in modules})
        written.pop("exclude_modules", None)
        # A later PEFT with transformers 5 would take the shared expert's names for the routed experts', open half of
        # the adapter and say nothing. It knows no dropout there, and raises. Opened for inference, there is none.
        written["lora_dropout"] = _REFUSED_BY_LATER_ONES
    alpha = written.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        written["lora_alpha"] = int(alpha)
    return written


def _manifest(folder: Path, changed: list[str]) -> dict[str, Any]:
    """The adapter's manifest, with the sizes and hashes of the files that were rewritten."""
    manifest = _read(folder / _MANIFEST)
    # It tells of an archive that does not hold these files.
    manifest.pop("archive", None)
    files = dict(manifest.get("files") or {})
    for name in changed:
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    return {**manifest, "kind": "transformers4", "files": files}


def _rewrite(file: Path, content: dict[str, Any]) -> bool:
    """Writes a JSON file if its content is another; returns whether it was."""
    if content == _read(file):
        return False
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def _read(file: Path) -> dict[str, Any]:
    """Returns {} for a file that is not there."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC, f"{file.name} of the adapter is not JSON", f"download the adapter again ({error})"
        ) from error
    return dict(found)
