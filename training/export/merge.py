"""Merges an adapter into its base model: a folder in the layout in which the base model was published.

Every reader that opens the base opens the merged model: the tensors keep their names, shapes and types, and those that
the adapter does not change keep their bytes. The model is never in memory: a tensor is read, changed and written in
pieces. The sum is computed in float32 and rounded once, to the stored type.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.events import ErrorCode
from training.export.merging.base_plus_adapter import Sum
from training.export.merging.base_weights import BaseWeights, PublishedWeights
from training.export.merging.deltas import AdaptedLayer, Adapter, read_adapter
from training.export.merging.merged_files import write_beside_files
from training.export.merging.proof import prove
from training.export.merging.shard_file import ShardFile
from training.export.merging.stored_names import StoredNames
from training.export.merging.tensor_pieces import FLOATS, StoredTensor
from training.export.merging.unfinished_folder import UnfinishedFolder, WrittenFile
from training.export.orders import OnBytes
from training.failures import TrainingFailed
from training.files.durable_files import sha256_of
from training.files.model_folder import INDEX, ModelFolder, faults_of_model, in_one_line
from training.files.published_form import fault_of_form

# Never fill a disk completely.
_SPARE_BYTES = 2**28


@dataclass(frozen=True)
class Merged:
    """A merged model on disk. `files` maps the name of each file to its bytes and sha256.

    `is_dequantised`: only the 4-bit copy of the base was there. `revision_is_known`: both the adapter and the base's
    folder say which revision they belong to, and it is the same."""

    path: str
    base_model: str
    base_revision: str | None
    revision_is_known: bool
    is_dequantised: bool
    merged_tensors: int
    bytes: int
    files: dict[str, WrittenFile]


@dataclass(frozen=True)
class _Base:
    """The base model that was found: its folder, its name for people, the hub's commit if known."""

    folder: ModelFolder
    name: str
    revision: str | None


def export_merged(request: Mapping[str, Any], on_bytes: OnBytes) -> dict[str, Any]:
    """The export `merged`. Request: base, adapter, into (folders); base_model and base_revision, if known."""
    # The disk decides how long it takes. Several threads would wait for each other at each small piece.
    torch.set_num_threads(1)
    merged = merge_adapter(
        Path(request["base"]),
        Path(request["adapter"]),
        Path(request["into"]),
        base_model=request.get("base_model"),
        base_revision=request.get("base_revision"),
        on_bytes=on_bytes,
    )
    return asdict(merged)


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    into: Path,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    on_bytes: OnBytes = lambda _done, _total: None,
) -> Merged:
    """Writes the merged model to `into`, a new folder: complete or absent. Killed and called again, it goes on.

    Raises TrainingFailed: invalid_spec (not an adapter, or not of this base; `into` is there already),
    model_incomplete, model_unsupported, disk_full."""
    _refuse_existing(into)
    adapter = read_adapter(adapter_folder)
    base = _open_base(base_folder, base_model or adapter.base_model or base_folder.name, base_revision)
    revision_is_known = _compare_revisions(adapter, base)
    names = StoredNames(base.folder, base.name)
    weights: BaseWeights
    if base.folder.kept_copy is None:
        weights = PublishedWeights(base.folder)
    else:
        # Imported here: it brings bitsandbytes along.
        from training.export.merging.kept_copy import KeptCopyWeights

        weights = KeptCopyWeights(base.folder, base.name, names)
        weights.check(base.folder.kept_copy)
    adapted = places(adapter, weights, names, base.name)
    fingerprint = {
        "base": weights.fingerprint,
        "adapter": sha256_of(adapter.folder / "adapter_model.safetensors"),
        "scales": {layer.module: layer.scale for layer in adapted.values()},
        "torch": torch.__version__,
    }
    is_dequantised = base.folder.kept_copy is not None
    with UnfinishedFolder.of(into, fingerprint) as unfinished, adapter.opened() as deltas:
        _refuse_small_disk(unfinished, weights)
        whole = Sum(weights, adapted, deltas)
        progress = _Progress(on_bytes, sum(shard.bytes for shard in weights.shards))
        for shard in weights.shards:
            if unfinished.has(shard.name):
                progress.add(shard.bytes)
                continue
            with ShardFile(unfinished.path / shard.name) as file:
                for piece in whole.pieces(shard):
                    file.write(piece)
                    progress.add(len(piece))
            unfinished.add(shard.name, WrittenFile(file.bytes, file.sha256))
        prove(unfinished.path, whole)
        if weights.index is not None:
            unfinished.write(INDEX, weights.index)
        write_beside_files(unfinished, base.folder, adapter, base.name, base.revision, is_dequantised=is_dequantised)
        unfinished.finish()
        files = unfinished.files
    return Merged(
        path=str(into),
        base_model=base.name,
        base_revision=base.revision,
        revision_is_known=revision_is_known,
        is_dequantised=is_dequantised,
        merged_tensors=len(adapted),
        bytes=sum(file.bytes for file in files.values()),
        files=files,
    )


def places(adapter: Adapter, weights: BaseWeights, names: StoredNames, base: str) -> dict[str, AdaptedLayer]:
    """Finds the stored tensor of each adapted layer. Raises TrainingFailed if the adapter is of another base."""
    stored = {tensor.name: tensor for shard in weights.shards for tensor in shard.tensors}
    by_parameter: dict[str, list[str]] = {}
    origins = names.origins(stored)
    for name, origin in origins.items():
        by_parameter.setdefault(origin.parameter, []).append(name)
    tied = names.tied()
    found = {}
    for module, layer in adapter.layers.items():
        if f"{module}.weight" in {*tied, *tied.values()}:
            raise TrainingFailed(
                ErrorCode.MODEL_UNSUPPORTED,
                f"the adapter changes {module}, whose weight {base} shares with another layer: both would change",
                "serve the adapter beside its base model instead",
            )
        sources = by_parameter.get(f"{module}.weight", [])
        if not sources:
            raise _of_another_base(f"{base} has no layer {module}")
        tensor = stored[sources[0]]
        if len(sources) > 1 or origins[tensor.name].conversion is not None:
            raise TrainingFailed(
                ErrorCode.MODEL_UNSUPPORTED,
                f"{base} stores the layer {module} in another form than it computes with, which is not merged yet",
                "serve the adapter beside its base model instead",
            )
        _refuse_form(tensor, base)
        if tensor.shape != (layer.outputs, layer.inputs):
            raise _of_another_base(
                f"its {module} is {layer.outputs} × {layer.inputs}, and that of {base} has the shape {tensor.shape}",
            )
        found[tensor.name] = layer
    return found


def _refuse_form(tensor: StoredTensor, base: str) -> None:
    if tensor.dtype not in FLOATS:
        raise TrainingFailed(
            ErrorCode.MODEL_UNSUPPORTED,
            f"{base} stores {tensor.name} as {tensor.dtype}, and an adapter can be merged into 16 or 32 bits only",
            "merge into a copy of this model in 16 bits (BF16), and quantise the result",
        )


def _open_base(path: Path, name: str, revision: str | None) -> _Base:
    """Opens the base model's folder. Raises TrainingFailed if it is not whole, or not in 16 or 32 bits."""
    pull = f"download it: `brightrun-trainer models pull {name}`"
    if not path.is_dir():
        raise TrainingFailed(ErrorCode.MODEL_NOT_FOUND, f"the base model {name} is not on this host", pull)
    if faults := faults_of_model(path):
        raise TrainingFailed(
            ErrorCode.MODEL_INCOMPLETE, f"the base model {name} is incomplete: {in_one_line(faults)}", pull
        )
    folder = ModelFolder.of(path)
    if (fault := fault_of_form(folder.config, name)) is not None:
        raise TrainingFailed(
            ErrorCode.MODEL_UNSUPPORTED,
            fault.replace("training needs", "a merge needs"),
            "merge into a copy of this model in 16 bits (BF16), and quantise the result",
        )
    return _Base(folder, name, revision)


def _compare_revisions(adapter: Adapter, base: _Base) -> bool:
    """True if both are known and equal, False if one is not known. Raises TrainingFailed if they differ."""
    if adapter.base_revision is None or base.revision is None:
        return False
    if adapter.base_revision != base.revision:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC,
            f"the adapter was trained on {base.name} at the revision {adapter.base_revision[:12]}, "
            f"and the folder here has {base.revision[:12]}",
            f"`hf download {base.name} --revision {adapter.base_revision} --local-dir FOLDER` fetches it; "
            "name that folder with --model",
        )
    return True


def _refuse_existing(into: Path) -> None:
    if into.exists() or into.is_symlink():
        raise TrainingFailed(ErrorCode.INVALID_SPEC, f"{into} exists already", "name a new folder")


def _refuse_small_disk(unfinished: UnfinishedFolder, weights: BaseWeights) -> None:
    needed = sum(shard.bytes for shard in weights.shards if not unfinished.has(shard.name))
    free = shutil.disk_usage(unfinished.path).free
    if free < needed + _SPARE_BYTES:
        raise TrainingFailed(
            ErrorCode.DISK_FULL,
            f"the merged model takes {needed / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free there",
            "free space, or name a folder on a larger disk",
        )


def _of_another_base(why: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.INVALID_SPEC,
        f"the adapter does not belong to this base model: {why}",
        "name the folder of the model that it was trained on with --model; its manifest.json says which",
    )


class _Progress:
    """Adds up what is done."""

    def __init__(self, on_bytes: OnBytes, total: int) -> None:
        self._on_bytes, self._total, self._done = on_bytes, total, 0

    def add(self, count: int) -> None:
        self._done += count
        self._on_bytes(self._done, self._total)
