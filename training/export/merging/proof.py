"""Proves a merged model against its base and its adapter, by reading back what was written.

Every header is compared: the same names, shapes and types as in the base's files. Of each tensor that the adapter
changes some rows are computed again, in float64 and element by element; of some of the others a piece is compared byte
by byte. It reads a few megabytes, whatever the model's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from training.events import ErrorCode
from training.export.merging.base_plus_adapter import Sum
from training.export.merging.base_weights import PlannedShard
from training.export.merging.deltas import AdaptedLayer
from training.export.merging.tensor_pieces import FLOATS, StoredTensor, rows_of, stored_in
from training.failures import TrainingFailed

_ROWS = 2
_UNCHANGED_A_SHARD = 4
_PIECE_BYTES = 4096
# How much of the largest sum float32 may lose in a rank's products: eight roundings of 2^-23.
_FLOAT32_LOSS = 2.0**-20


def prove(written: Path, whole: Sum) -> None:
    """Raises TrainingFailed(internal) if what lies in `written` is not base plus adapter."""
    for shard in whole.weights.shards:
        file = written / shard.name
        head, tensors = stored_in(file)
        if head != shard.head or file.stat().st_size != shard.bytes:
            raise _differs(f"the header or the length of {shard.name}")
        there = {tensor.name: tensor for tensor in tensors}
        for tensor in shard.tensors:
            if tensor.name in whole.adapted and not _is_sum(file, there[tensor.name], whole, shard, tensor):
                raise _differs(tensor.name)
        for tensor in _some(shard, whole.adapted):
            begin = _number(tensor.name, max(tensor.bytes - _PIECE_BYTES, 0) + 1)
            length = min(_PIECE_BYTES, tensor.bytes)
            kept = whole.weights.part(shard, tensor, begin, length)
            if kept is not None and kept != _part(file, there[tensor.name].begin + begin, length):
                raise _differs(tensor.name)


def _is_sum(file: Path, there: StoredTensor, whole: Sum, shard: PlannedShard, tensor: StoredTensor) -> bool:
    """True if some rows are base + scale × B × A, as exactly as their type and float32 allow."""
    info = torch.finfo(FLOATS[tensor.dtype])
    delta = whole.deltas.of(whole.adapted[tensor.name])
    for number in {_number(f"{tensor.name}:{turn}", tensor.shape[0]) for turn in range(_ROWS)}:
        base_I = whole.weights.row(shard, tensor, number).double()
        found_I = next(rows_of(file, there, number, number + 1))[0].double()
        products_RI = delta.b_OR[number].double()[:, None] * delta.a_RI.double() * delta.scale
        exact_I = base_I + products_RI.sum(0)
        magnitude_I = base_I.abs() + products_RI.abs().sum(0)
        # Half a step of the stored type, what float32 loses in sum and product, and the numbers too small for a step.
        most_I = 0.5 * info.eps * exact_I.abs() + _FLOAT32_LOSS * magnitude_I + info.tiny * info.eps
        if bool(((found_I - exact_I).abs() > most_I).any()):
            return False
    return True


def _some(shard: PlannedShard, adapted: Mapping[str, AdaptedLayer]) -> list[StoredTensor]:
    """The tensors of a shard that are compared byte by byte; always the same ones."""
    unchanged = [tensor for tensor in shard.tensors if tensor.name not in adapted and tensor.bytes]
    return sorted(unchanged, key=lambda tensor: _number(tensor.name, 2**32))[:_UNCHANGED_A_SHARD]


def _part(file: Path, begin: int, length: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(begin)
        return opened.read(length)


def _number(text: str, below: int) -> int:
    """A number that looks random and is the same in each run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % below


def _differs(what: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.INTERNAL,
        f"the merged model was read back and is not base plus adapter: {what} differs",
        "export again; if it fails the same way, check this host's disk and memory",
    )
