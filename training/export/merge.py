"""Merges an adapter into its base model: a folder in the layout in which the base model was published.

Every reader that opens the base opens the merged model: the tensors keep their names, shapes and types, and those that
the adapter does not change keep their bytes. The model is never in memory: a tensor is read, changed and written in
pieces. The sum is computed in float32 and rounded once, to the stored type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.export.orders import OnBytes


@dataclass(frozen=True)
class Merged:
    """A merged model on disk. `files` maps the name of each file to its sha256."""

    path: Path
    base_model: str
    base_revision: str | None
    # True if only the 4-bit copy of the base was there: its weights are the base's as they were in training, rounded.
    is_dequantised: bool
    merged_tensors: int
    bytes: int
    files: dict[str, str]


def export_merged(request: Mapping[str, Any], on_bytes: OnBytes) -> dict[str, Any]:
    """The export `merged`. Request: base, adapter, into (folders); base_model and base_revision, if known."""
    merged = merge_adapter(
        Path(request["base"]),
        Path(request["adapter"]),
        Path(request["into"]),
        base_model=request.get("base_model"),
        base_revision=request.get("base_revision"),
        on_bytes=on_bytes,
    )
    return {
        "path": str(merged.path),
        "base_model": merged.base_model,
        "base_revision": merged.base_revision,
        "is_dequantised": merged.is_dequantised,
        "merged_tensors": merged.merged_tensors,
        "bytes": merged.bytes,
        "files": merged.files,
    }


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    into: Path,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    on_bytes: OnBytes = lambda _done, _total: None,
) -> Merged:
    """Writes the merged model to `into`, a new folder: complete or absent.

    Raises TrainingFailed: invalid_spec (not an adapter, or not of this base), model_incomplete, model_unsupported,
    disk_full."""
    raise NotImplementedError
