"""Where a merge reads the base model's weights: in the files that were published, or in the 4-bit copy where only that
is kept. Both give the same: shards to write, and the tensors of each in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from training.export.merging.tensor_pieces import StoredTensor, pieces, rows_of, stored_in
from training.files.model_folder import INDEX, ModelFolder


@dataclass(frozen=True)
class PlannedShard:
    """A file of the merged model: its name, length and header, and its tensors in order."""

    name: str
    head: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def bytes(self) -> int:
        return len(self.head) + sum(tensor.bytes for tensor in self.tensors)


class BaseWeights(Protocol):
    """The base model's weights in the layout in which they were published."""

    @property
    def shards(self) -> tuple[PlannedShard, ...]: ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What would have to be the same for a merge to go on where another ended."""

    @property
    def index(self) -> str | None:
        """The text of the index file; None if there is one shard, and none was published."""

    def raw(self, shard: PlannedShard, tensor: StoredTensor) -> Iterator[memoryview]:
        """A tensor's bytes, as they are written."""

    def rows(self, shard: PlannedShard, tensor: StoredTensor) -> Iterator[torch.Tensor]:
        """A matrix in blocks of rows, in the type in which it is written."""

    def row(self, shard: PlannedShard, tensor: StoredTensor, number: int) -> torch.Tensor:
        """One row of a matrix."""

    def part(self, shard: PlannedShard, tensor: StoredTensor, begin: int, length: int) -> bytes | None:
        """Some bytes of a tensor; None if that would cost as much as all of it."""


class PublishedWeights:
    """The shards of a model's folder. The merged model has the same, header by header."""

    def __init__(self, folder: ModelFolder) -> None:
        self._files = {shard.name: shard for shard in folder.shards}
        planned = []
        for shard in folder.shards:
            head, tensors = stored_in(shard)
            planned.append(PlannedShard(shard.name, head, tuple(tensors)))
        self.shards = tuple(planned)
        index = folder.path / INDEX
        self.index = index.read_text(encoding="utf-8") if index.is_file() else None

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in self._files.items()}

    def raw(self, shard: PlannedShard, tensor: StoredTensor) -> Iterator[memoryview]:
        return pieces(self._file(shard), tensor.begin, tensor.end)

    def rows(self, shard: PlannedShard, tensor: StoredTensor) -> Iterator[torch.Tensor]:
        return rows_of(self._file(shard), tensor)

    def row(self, shard: PlannedShard, tensor: StoredTensor, number: int) -> torch.Tensor:
        return next(rows_of(self._file(shard), tensor, number, number + 1))[0]

    def part(self, shard: PlannedShard, tensor: StoredTensor, begin: int, length: int) -> bytes | None:
        return b"".join(pieces(self._file(shard), tensor.begin + begin, tensor.begin + begin + length))

    def _file(self, shard: PlannedShard) -> Path:
        return self._files[shard.name]
