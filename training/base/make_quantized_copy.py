"""Makes the 4-bit copy of a base model before any job needs it, so that no job spends GPU time on it.

    python -m training.base.make_quantized_copy MODEL_DIR NAME QUANTIZED_DIR cpu|cuda [auto|bfloat16|float32]

Prints one JSON line: the copy's folder and bytes, or the code, message and hint of an error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.compute import ComputeType
from training.failures import TrainingFailed
from training.files.model_folder import open_model_folder
from training.quick_imports import quick_imports

_COMPUTE_TYPES: dict[str, ComputeType | None] = {"auto": None, "bfloat16": "bfloat16", "float32": "float32"}


@dataclass(frozen=True)
class Request:
    """The part of a spec that loading reads."""

    base_model: str
    device: Literal["cpu", "cuda"]
    quantized_dir: Path | None
    compute_type: ComputeType | None = None
    quantize: bool = True


def quantize(model_dir: Path, request: Request) -> dict[str, object]:
    """Loads the model as a job would, which writes a missing or unusable copy. Raises TrainingFailed."""
    with quick_imports():
        from training.base.dtype import compute_dtype
        from training.base.load import load_base_model
        from training.base.rehearsal import rehearse_loading
        from training.quantization.disk_copy import QuantizedCopy

    assert request.quantized_dir is not None
    folder = open_model_folder(model_dir, request.base_model)
    if folder.kept_copy is not None:
        load_base_model(request, folder)
        return _answer(folder.kept_copy, made_before=True)
    dtype = compute_dtype(request.device, request.compute_type)
    copy = QuantizedCopy.of(request.quantized_dir, folder, request.base_model, dtype)
    made_before = copy.exists
    rehearse_loading(request, folder)
    load_base_model(request, folder)
    if not copy.exists:
        return {
            "ok": False,
            "code": "disk_full",
            "message": f"the volume of {request.quantized_dir} has no room for the 4-bit copy of {request.base_model}",
            "hint": "free space there: it takes a bit more than a quarter of the model's own size",
        }
    return _answer(copy.path, made_before=made_before)


def _answer(copy: Path, *, made_before: bool) -> dict[str, object]:
    size = sum(file.stat().st_size for file in copy.iterdir())
    return {"ok": True, "path": str(copy), "bytes": size, "made_before": made_before}


def main() -> int:
    model_dir, name, quantized_dir, device, *rest = sys.argv[1:]
    asked = _COMPUTE_TYPES[rest[0] if rest else "auto"]
    request = Request(name, "cuda" if device == "cuda" else "cpu", Path(quantized_dir), asked)
    try:
        answer = quantize(Path(model_dir), request)
    except TrainingFailed as failed:
        answer = {"ok": False, "code": failed.code, "message": failed.message, "hint": failed.hint}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
