"""Restores the published layout of a model from its 4-bit copy, where `models quantize --replace` kept nothing else.

The values are those that the job was trained on, rounded to the type in which the model was published; the 16-bit
originals are gone. Layers that are published with a model and never loaded (they predict tokens further on) are not in
the copy, and so not in what is restored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from safetensors import safe_open
from transformers.core_model_loading import Concatenate, MergeModulelist

from training.events import ErrorCode
from training.export.merging.base_weights import PlannedShard
from training.export.merging.shard_file import header_of
from training.export.merging.stored_names import Origin, StoredNames
from training.export.merging.tensor_pieces import FLOATS, StoredTensor, bytes_of, elements
from training.failures import TrainingFailed
from training.files.durable_files import sha256_of
from training.files.model_folder import WEIGHTS, ModelFolder, read_copy_manifest
from training.quantization.nf4 import fills_blocks, unpack, unpack_experts

_SHARD_BYTES = 4 * 2**30
# A step of unpacking: some experts of a layer at once.
_STEP_ELEMENTS = 2**24
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# A layer's fused experts are asked for expert by expert, two parameters in turn.
_HELD_PARAMETERS = 2


class KeptCopyWeights:
    """The 4-bit copy of a model's folder, unpacked. Raises TrainingFailed if it is damaged, or of a layout unknown."""

    def __init__(self, folder: ModelFolder, name: str, names: StoredNames) -> None:
        assert folder.kept_copy is not None
        self._name = name
        manifest = read_copy_manifest(folder.kept_copy)
        self._hashes: dict[str, str] = manifest["files"]
        self._files: dict[str, Path] = {}
        for file in self._hashes:
            with safe_open(folder.kept_copy / file, framework="pt", device="cpu", backend="pread") as opened:
                self._files |= dict.fromkeys(opened.keys(), folder.kept_copy / file)
        self._states: dict[str, list[str]] = {}
        for key in self._files:
            if key.startswith("state:"):
                self._states.setdefault(key.split(":")[1], []).append(key)
        self._aliases = names.tied()
        self._origins = names.origins(manifest["tensors"])
        self._dtype = _dtype_of(folder)
        self.shards = self._plan(manifest["tensors"])
        self.index = _index_of(self.shards) if len(self.shards) > 1 else None
        self._read = lru_cache(maxsize=_HELD_PARAMETERS)(self._read_parameter)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return dict(self._hashes)

    def check(self, folder: Path) -> None:
        """Reads and hashes every file: a flipped bit in four would be a wrong weight that nobody sees."""
        for name, expected in self._hashes.items():
            if sha256_of(folder / name) != expected:
                raise self._unusable(f"{name} has a different hash than when it was written")

    def raw(self, _shard: PlannedShard, tensor: StoredTensor) -> Iterator[memoryview]:
        return (bytes_of(block) for block in self._blocks(tensor))

    def rows(self, _shard: PlannedShard, tensor: StoredTensor) -> Iterator[torch.Tensor]:
        return self._blocks(tensor)

    def row(self, _shard: PlannedShard, tensor: StoredTensor, number: int) -> torch.Tensor:
        for block in self._blocks(tensor):
            if number < block.shape[0]:
                return block[number]
            number -= block.shape[0]
        raise IndexError(number)

    def part(self, _shard: PlannedShard, _tensor: StoredTensor, _begin: int, _length: int) -> bytes | None:
        return None

    def _blocks(self, tensor: StoredTensor) -> Iterator[torch.Tensor]:
        origin = self._origins[tensor.name]
        packed, state = self._read(self._aliases.get(origin.parameter, origin.parameter))
        dtype = FLOATS[tensor.dtype]
        if origin.conversion is not None:
            yield self._expert(tensor, origin, packed, state).to(dtype)
        elif state is None:
            self._compare(tensor, tuple(packed.shape))
            yield packed.to(dtype)
        elif len(state.shape) == 3 and fills_blocks(state.shape):
            self._compare(tensor, tuple(state.shape))
            step = max(1, _STEP_ELEMENTS // math.prod(state.shape[1:]))
            for first in torch.arange(state.shape[0]).split(step):
                yield unpack_experts(packed, state, first).to(dtype)
        else:
            self._compare(tensor, tuple(state.shape))
            yield unpack(packed, state).to(dtype)

    def _expert(
        self, tensor: StoredTensor, origin: Origin, packed: torch.Tensor, state: QuantState | None
    ) -> torch.Tensor:
        """One matrix of one expert, out of the parameter that holds those of all experts of a layer."""
        assert origin.conversion is not None
        operations = origin.conversion.operations
        number = _EXPERT.search(tensor.name)
        parts = len(origin.conversion.source_patterns)
        if (
            number is None
            or not operations
            or not isinstance(operations[0], MergeModulelist)
            or any(not isinstance(operation, Concatenate) or operation.dim != 1 for operation in operations[1:])
            or (parts > 1) != (len(operations) == 2)
        ):
            raise self._unusable(f"the tensor {tensor.name} cannot be restored from it")
        expert = int(number[1])
        if state is None:
            whole = packed[expert]
        elif fills_blocks(state.shape):
            whole = unpack_experts(packed, state, torch.tensor([expert]))[0]
        else:
            whole = unpack(packed, state)[expert]
        rows = whole.chunk(parts)[origin.part]
        self._compare(tensor, tuple(rows.shape))
        return rows

    def _read_parameter(self, path: str) -> tuple[torch.Tensor, QuantState | None]:
        data = self._tensor(f"parameter:{path}")
        keys = self._states.get(path)
        if keys is None:
            return data, None
        return data, QuantState.from_dict(
            {key.split(":")[2]: self._tensor(key) for key in keys}, device=torch.device("cpu")
        )

    def _tensor(self, key: str) -> torch.Tensor:
        if key not in self._files:
            raise self._unusable(f"it lacks {key}")
        with safe_open(self._files[key], framework="pt", device="cpu", backend="pread") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def _plan(self, shapes: dict[str, tuple[int, ...]]) -> tuple[PlannedShard, ...]:
        """Distributes the tensors over shards, in the order of the model's blocks."""
        width = torch.empty(0, dtype=FLOATS[self._dtype]).element_size()
        groups: list[list[str]] = [[]]
        size = 0
        for name in sorted(self._origins, key=_natural):
            tensor_bytes = elements(shapes[name]) * width
            if groups[-1] and size + tensor_bytes > _SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += tensor_bytes
        planned = []
        for number, group in enumerate(groups, 1):
            head = header_of([(name, self._dtype, tuple(shapes[name])) for name in group], {"format": "pt"})
            file = WEIGHTS if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
            planned.append(PlannedShard(file, head, tuple(_placed(group, shapes, self._dtype, width, len(head)))))
        return tuple(planned)

    def _compare(self, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
        if shape != tensor.shape:
            raise self._unusable(f"{tensor.name} has the shape {shape} in it, and {tensor.shape} as published")

    def _unusable(self, why: str) -> TrainingFailed:
        return TrainingFailed(
            ErrorCode.MODEL_INCOMPLETE,
            f"only the 4-bit copy of {self._name} is kept on this host, and it cannot be used for this: {why}",
            f"download the model again: `brightrun-trainer models pull {self._name}`",
        )


def _placed(
    names: list[str], shapes: dict[str, tuple[int, ...]], dtype: str, width: int, begin: int
) -> Iterator[StoredTensor]:
    for name in names:
        end = begin + elements(shapes[name]) * width
        yield StoredTensor(name, dtype, tuple(shapes[name]), begin, end)
        begin = end


def _dtype_of(folder: ModelFolder) -> str:
    """The type in which the model was published, as its config says; bfloat16 if it does not."""
    said = folder.config.get("dtype") or folder.config.get("torch_dtype") or folder.text_config.get("dtype")
    by_name = {str(dtype).removeprefix("torch."): name for name, dtype in FLOATS.items()}
    return by_name.get(str(said), "BF16")


def _index_of(shards: tuple[PlannedShard, ...]) -> str:
    total = sum(tensor.bytes for shard in shards for tensor in shard.tensors)
    placed = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2, sort_keys=True) + "\n"


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts block 2 before block 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
