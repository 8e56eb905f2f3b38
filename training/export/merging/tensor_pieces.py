"""The base model's tensors as they lie in its published files: names, types, places, and their bytes in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from training.files.model_folder import read_header, tensors_in

# How much of a tensor is in memory at once: its bytes, or its rows. What the processor's cache holds is fastest.
PIECE_BYTES = 4 * 2**20
_ROWS_ELEMENTS = 2**20

# By safetensors' names. Only these are added to; others are copied.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `begin` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def stored_in(shard: Path) -> tuple[bytes, list[StoredTensor]]:
    """Returns the length and header of a safetensors file as they are, and its tensors in the order of their bytes."""
    with shard.open("rb") as file:
        length = file.read(8)
        head = length + file.read(int.from_bytes(length, "little"))
    tensors = [
        StoredTensor(
            name,
            str(entry["dtype"]),
            tuple(int(size) for size in entry["shape"]),
            len(head) + int(entry["data_offsets"][0]),
            len(head) + int(entry["data_offsets"][1]),
        )
        for name, entry in tensors_in(read_header(shard)).items()
    ]
    return head, sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))


def pieces(shard: Path, begin: int, end: int) -> Iterator[memoryview]:
    """Yields a part of a file in pieces. Each is valid until the next. Raises OSError if the file is too short."""
    piece = memoryview(bytearray(min(PIECE_BYTES, max(end - begin, 1))))
    with shard.open("rb", buffering=0) as file:
        file.seek(begin)
        while begin < end:
            count = file.readinto(piece[: end - begin])
            if not count:
                raise OSError(f"{shard.name} ends too early")
            yield piece[:count]
            begin += count


def rows_of(shard: Path, tensor: StoredTensor, begin: int = 0, end: int | None = None) -> Iterator[torch.Tensor]:
    """Yields a matrix as blocks of whole rows, in its stored type, each with memory of its own."""
    rows, width = tensor.shape
    last = rows if end is None else end
    row_bytes = tensor.bytes // max(rows, 1)
    step = max(1, _ROWS_ELEMENTS // max(width, 1))
    with shard.open("rb", buffering=0) as file:
        for first in range(begin, last, step):
            count = min(step, last - first)
            block = bytearray(count * row_bytes)
            file.seek(tensor.begin + first * row_bytes)
            _read_all(file, memoryview(block), shard)
            yield torch.frombuffer(block, dtype=FLOATS[tensor.dtype]).view(count, width)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _read_all(file: object, block: memoryview, shard: Path) -> None:
    done = 0
    while done < len(block):
        count = file.readinto(block[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{shard.name} ends too early")
        done += count
