"""Reads the base model's weights once from the volume while libraries are imported and data prepared.

Loading then finds them in the kernel's page cache. Nothing is kept here and nothing waits for it; if the data turn out
bad, the process ends without it. The weights are not loaded in this thread: loading and preparing data need the same
interpreter and, on a CPU, the same cores (tried: slower than one after the other), and a load in C cannot be stopped.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from training.files.free_memory import free_bytes
from training.files.model_folder import KEPT_COPY
from training.spec import JobSpec

_PIECE_BYTES = 8 * 2**20
# The share of free memory to use: pages that were read must still be there when they are needed.
_MEMORY_SHARE = 0.5


def read_ahead(spec: JobSpec) -> threading.Thread:
    """Starts reading in a thread and returns at once."""
    room_bytes = int(_MEMORY_SHARE * free_bytes())
    thread = threading.Thread(target=_read, args=(weights_of(spec), room_bytes), name="read-ahead", daemon=True)
    thread.start()
    return thread


def weights_of(spec: JobSpec) -> list[Path]:
    """Guesses the files that loading will read: the newest 4-bit copy, else the model's own."""
    folders = [spec.model_path / KEPT_COPY, spec.model_path]
    if spec.quantize and spec.quantized_dir is not None:
        copies = spec.quantized_dir.glob(f"{spec.base_model.replace('/', '--')}-nf4-*")
        folders = [*sorted(copies, key=lambda path: path.stat().st_mtime, reverse=True), *folders]
    return next((found for folder in folders if (found := sorted(folder.glob("*.safetensors")))), [])


def _read(files: list[Path], room_bytes: int) -> None:
    piece = bytearray(_PIECE_BYTES)
    # Loading reports what cannot be read.
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                while (count := file.readinto(piece)) and (room_bytes := room_bytes - count) > 0:
                    pass
