"""Reads tensors of safetensors files in pieces, as numpy arrays: without torch, and without a whole file in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.files.model_folder import read_header, tensors_in

Array = np.ndarray[Any, Any]

# numpy has no bfloat16: its bits are read as integers.
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk. `type` is the safetensors name of its type: BF16, F32, …"""

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def is_readable(self) -> bool:
        return self.type in _TYPES

    def bits(self) -> Array:
        """Maps the tensor as stored, bfloat16 as uint16. Pages are read when used and may be dropped afterwards."""
        return np.memmap(self.path, _TYPES[self.type], "r", self.offset, self.shape) if self.shape else self._scalar()

    def _scalar(self) -> Array:
        return np.array(np.memmap(self.path, _TYPES[self.type], "r", self.offset, (1,))[0])


def stored_tensors(shards: tuple[Path, ...]) -> Iterator[StoredTensor]:
    """Yields every tensor of these files, in the order in which it lies in them. Raises OSError or ValueError."""
    for shard in shards:
        header_bytes = 8 + int.from_bytes(_first_eight(shard), "little")
        entries = tensors_in(read_header(shard))
        for name, entry in sorted(entries.items(), key=lambda item: int(item[1]["data_offsets"][0])):
            begin = header_bytes + int(entry["data_offsets"][0])
            yield StoredTensor(shard, name, str(entry["dtype"]), tuple(entry["shape"]), begin)


def _first_eight(shard: Path) -> bytes:
    with shard.open("rb") as file:
        return file.read(8)


def in_float32(bits: Array, type_: str) -> Array:
    """Returns values that `bits()` mapped, in float32."""
    if type_ == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)
