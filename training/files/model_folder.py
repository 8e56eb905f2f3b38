"""Checks that a folder holds a whole model: config, tokenizer, and every shard that the index names, at full length.

The daemon checks before an attempt and the trainer before it loads, with this same code. Sizes come from the
safetensors headers, so a truncated download is found without reading the weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.module_names import is_loaded
from training.files.published_form import TAKE_16_BITS, fault_of_form

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# The subfolder where `models quantize --replace` leaves the 4-bit copy, alone, in the model's own folder.
KEPT_COPY = "nf4"
COPY_MANIFEST = "manifest.json"

# Each of these sets is a vocabulary that transformers reads without remote code. A vocab.json needs its merges: alone
# it loads as a tokenizer that cannot join letters. The *.tiktoken of the first Qwen needs remote code.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("vocab.txt",),
    ("tekken.json",),
)
# The limit of the safetensors library itself. The largest real header (a hundred thousand tensors) is about 15 MB.
_MAX_HEADER_BYTES = 100_000_000
# What reading one of our files may raise if it is damaged, whatever its content.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a readable config, every shard of its weights, and a tokenizer.

    If only the 4-bit copy of the weights is kept, `kept_copy` is its folder and there are no shards.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    kept_copy: Path | None = None

    @classmethod
    def of(cls, path: Path) -> ModelFolder:
        """Reads a folder in which `faults_of_model` found nothing."""
        if keeps_copy_only(path):
            return cls(path, read_config(path), (), path / KEPT_COPY)
        return cls(path, read_config(path), tuple(path / name for name in sorted(_tensors_by_shard(path))))

    @property
    def weight_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields the name and shape of each tensor of the model, from the files' headers or the copy's manifest.

        Without those that are published with it and not loaded."""
        layers = self.layer_count
        for name, shape in self._tensors_in_files():
            if layers is None or is_loaded(name, layers):
                yield name, shape

    @property
    def layer_count(self) -> int | None:
        """The number of blocks of the language model, if its config says."""
        config = self.text_config
        found = config.get("num_hidden_layers") or config.get("n_layer")
        return found if isinstance(found, int) else None

    def _tensors_in_files(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.kept_copy is not None:
            yield from read_copy_manifest(self.kept_copy)["tensors"].items()
        for shard in self.shards:
            for name, entry in tensors_in(read_header(shard)).items():
                yield name, tuple(entry["shape"])


def open_model_folder(path: Path, name: str) -> ModelFolder:
    """Checks a folder. Raises TrainingFailed: model_not_found, model_incomplete naming what is missing, or
    model_unsupported for weights that are not in 16 bits."""
    if not path.is_dir():
        raise TrainingFailed(
            ErrorCode.MODEL_NOT_FOUND,
            f"the base model {name} is not on this host",
            "download it with `brightrun-trainer models pull`, or correct base_model",
        )
    faults = faults_of_model(path)
    if faults:
        raise TrainingFailed(
            ErrorCode.MODEL_INCOMPLETE,
            f"the base model {name} is incomplete: {in_one_line(faults)}",
            f"download the model again: `brightrun-trainer models pull {name}` (`models verify` names every fault)",
        )
    folder = ModelFolder.of(path)
    if (fault := fault_of_form(folder.config, name)) is not None:
        raise TrainingFailed(ErrorCode.MODEL_UNSUPPORTED, fault, TAKE_16_BITS)
    return folder


def faults_of_model(path: Path) -> list[str]:
    """Returns everything that makes the folder incomplete, in words, shard by name; [] if it is a whole model."""
    faults = []
    if not (path / CONFIG).is_file():
        faults.append(f"{CONFIG} is missing")
    elif not read_config(path):
        faults.append(f"{CONFIG} is not a JSON object")
    if not any(all((path / name).is_file() for name in names) for names in _VOCABULARIES):
        faults.append("no tokenizer files (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    return faults + _faults_of_weights(path)


def faults_of_copy(copy: Path) -> list[str]:
    """Lists why a 4-bit copy cannot be used: a file missing or cut, or other library versions than when it was made."""
    try:
        manifest = read_copy_manifest(copy)
    except _UNREADABLE as error:
        return [f"the 4-bit copy's {COPY_MANIFEST} cannot be read ({type(error).__name__})"]
    faults = [fault for name in sorted(manifest["files"]) for fault in _faults_of_shard(copy / name)]
    for library, made_with in sorted(manifest["versions"].items()):
        with contextlib.suppress(PackageNotFoundError):
            if (here := version(library)) != made_with:
                faults.append(f"the 4-bit copy was made with {library} {made_with}, and {here} is installed")
    return faults


def in_one_line(faults: list[str]) -> str:
    """Returns the first faults for an error message, and how many more there are."""
    return "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")


def read_config(path: Path) -> dict[str, Any]:
    """Returns config.json, or {} if it cannot be read (`faults_of_model` reports that)."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def keeps_copy_only(path: Path) -> bool:
    """Returns True if a 4-bit copy stands in place of the weights. 16-bit weights beside it take precedence."""
    has_weights = (path / INDEX).exists() or (path / WEIGHTS).exists()
    return not has_weights and (path / KEPT_COPY / COPY_MANIFEST).is_file()


def read_copy_manifest(copy: Path) -> dict[str, Any]:
    """Returns the manifest of a 4-bit copy. Raises OSError, ValueError, KeyError, TypeError or AttributeError."""
    manifest = dict(json.loads((copy / COPY_MANIFEST).read_text(encoding="utf-8")))
    return {
        "files": {str(name): str(digest) for name, digest in manifest["files"].items()},
        "tensors": {str(name): tuple(shape) for name, shape in manifest["tensors"].items()},
        "versions": dict(manifest["fingerprint"]["versions"]),
    }


def read_header(shard: Path) -> dict[str, Any]:
    """Returns the JSON header of a safetensors file. Raises OSError, or ValueError if there is none."""
    with shard.open("rb") as file:
        length = _header_bytes(file.read(8))
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{shard.name} has no header")
    return header


def _header_bytes(first_eight: bytes) -> int:
    length = int.from_bytes(first_eight, "little")
    # A damaged length must not make us read a whole weight file.
    if len(first_eight) < 8 or length > _MAX_HEADER_BYTES:
        raise ValueError("no length of a safetensors header")
    return length


def tensors_in(header: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _faults_of_weights(path: Path) -> list[str]:
    if keeps_copy_only(path):
        return faults_of_copy(path / KEPT_COPY)
    if (path / INDEX).exists() or (path / WEIGHTS).exists():
        return _faults_of_shards(path)
    # In a Hugging Face cache a link may point to a missing blob: the link exists, the file does not.
    if (path / INDEX).is_symlink() or (path / WEIGHTS).is_symlink():
        return ["the weights are a link to a file that is gone"]
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        return ["only pickled weights (.bin, .pt); safetensors are needed, pickles are never loaded"]
    return [f"no weights ({WEIGHTS} or {INDEX})"]


def _faults_of_shards(path: Path) -> list[str]:
    try:
        by_shard = _tensors_by_shard(path)
    except _UNREADABLE as error:
        return [f"{INDEX} cannot be read ({type(error).__name__})"]
    faults = [] if by_shard else [f"{INDEX} names no weights"]
    for shard, tensors in sorted(by_shard.items()):
        if "/" in shard or shard.startswith("."):
            faults.append(f"{INDEX} names a shard outside the folder: {shard}")
        else:
            faults += _faults_of_shard(path / shard, tensors)
    return faults


def _tensors_by_shard(path: Path) -> dict[str, set[str]]:
    """Returns the weight files by name, with the tensors that the index promises in each; a single file has none."""
    if not (path / INDEX).exists():
        return {WEIGHTS: set()}
    by_shard: dict[str, set[str]] = {}
    for tensor, shard in dict(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]).items():
        by_shard.setdefault(str(shard), set()).add(tensor)
    return by_shard


def _faults_of_shard(file: Path, expected_tensors: set[str] | None = None) -> Iterator[str]:
    if not file.is_file():
        yield f"shard {file.name} is missing"
        return
    size = file.stat().st_size
    try:
        tensors = {name: entry["data_offsets"][1] for name, entry in tensors_in(read_header(file)).items()}
        with file.open("rb") as stream:
            whole = 8 + _header_bytes(stream.read(8)) + max(tensors.values(), default=0)
    except _UNREADABLE:
        yield f"shard {file.name} ({size:,} bytes) has no readable safetensors header"
        return
    if size != whole:
        yield f"shard {file.name} has {size:,} bytes of {whole:,}"
    missing = sorted((expected_tensors or set()) - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield f"shard {file.name} lacks the tensor {missing[0]}{more}"
