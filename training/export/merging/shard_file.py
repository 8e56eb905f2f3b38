"""Writes one safetensors file from beginning to end, hashed while it is written, and on disk when it is closed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from training.export.merging.tensor_pieces import FLOATS, elements

# safetensors pads its header with spaces to a multiple of this.
_ALIGNMENT = 8
_BYTES = {name: torch.empty(0, dtype=dtype).element_size() for name, dtype in FLOATS.items()}


def header_of(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Returns length and header of a file with these tensors (name, type, shape), one after the other."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + elements(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class ShardFile:
    """A new file. A context manager: leaving it without an error puts every byte on disk."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, piece: bytes | memoryview) -> None:
        view = memoryview(piece).cast("B")
        self._digest.update(view)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0
        self.bytes += len(view)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                # Now, while the next shard is prepared: at the end all of them would have to be waited for.
                os.fsync(self._file.fileno())
