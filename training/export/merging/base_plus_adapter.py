"""The sum of a base model and an adapter, file by file and piece by piece: never the model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from training.events import ErrorCode
from training.export.merging.base_weights import BaseWeights, PlannedShard
from training.export.merging.deltas import AdaptedLayer, Deltas
from training.export.merging.tensor_pieces import bytes_of
from training.failures import TrainingFailed


@dataclass(frozen=True)
class Sum:
    """Base plus adapter: the weights, the layers by the stored tensor that they change, and the adapter's factors."""

    weights: BaseWeights
    adapted: Mapping[str, AdaptedLayer]
    deltas: Deltas

    def pieces(self, shard: PlannedShard) -> Iterator[bytes | memoryview]:
        """A file of the merged model from its beginning to its end. Each piece is valid until the next."""
        yield shard.head
        for tensor in shard.tensors:
            layer = self.adapted.get(tensor.name)
            if layer is None:
                yield from self.weights.raw(shard, tensor)
                continue
            delta = self.deltas.of(layer)
            row = 0
            for block in self.weights.rows(shard, tensor):
                merged = delta.added_to(block, row)
                if not _is_finite(merged):
                    raise TrainingFailed(
                        ErrorCode.MODEL_UNSUPPORTED,
                        f"{tensor.name} would not be finite: the sum does not fit into {tensor.dtype}",
                        "serve the adapter beside its base model instead",
                    )
                row += block.shape[0]
                yield bytes_of(merged)


def _is_finite(block: torch.Tensor) -> bool:
    """True if no element is NaN or infinite. A sum tells in one pass, unless it overflows itself."""
    return bool(block.sum(dtype=torch.float32).isfinite()) or bool(block.isfinite().all())
