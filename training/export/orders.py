"""What can be asked of this room: one request, one kind of export. Each kind is a function of its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from training.events import ErrorCode
from training.failures import TrainingFailed
from training.quick_imports import quick_imports

OnBytes = Callable[[int, int], None]  # bytes done, total bytes
# Takes the request and where to report progress; returns the result, JSON without secrets. Raises TrainingFailed.
Export = Callable[[Mapping[str, Any], OnBytes], dict[str, Any]]

# By the request's `kind`. Imported when asked for: each needs other libraries.
_EXPORTS = {
    "gguf": "training.export.gguf:export_gguf",
    "merged": "training.export.merge:export_merged",
    "transformers4": "training.export.transformers4:export_transformers4",
}


def export_of(kind: str) -> Export:
    """Returns the function of a kind. Raises TrainingFailed(invalid_spec) for a kind that there is not."""
    if kind not in _EXPORTS:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC,
            f"there is no export of the kind {kind[:80]!r}",
            f"choose one of: {', '.join(sorted(_EXPORTS))}",
        )
    module, _, name = _EXPORTS[kind].partition(":")
    with quick_imports():
        function: Export = getattr(import_module(module), name)
    return function
