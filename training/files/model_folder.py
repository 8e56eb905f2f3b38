"""What a base model's folder must hold, checked by names and headers before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.events import ErrorCode
from training.failures import TrainingFailed

# Where `models quantize --replace` leaves the 4-bit copy, alone, in the model's own folder. (The daemon's model_files
# has the same names.)
KEPT_COPY = "nf4"
COPY_MANIFEST = "manifest.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that has a readable config, every shard of its weights, and a tokenizer.

    Where the 4-bit copy is all that is kept of the weights, `kept_copy` is its folder and there are no shards.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    kept_copy: Path | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint, from the files' headers or what the copy remembers."""
        if self.kept_copy is not None:
            manifest = json.loads((self.kept_copy / COPY_MANIFEST).read_text(encoding="utf-8"))
            yield from ((name, tuple(shape)) for name, shape in manifest["tensors"].items())
        for shard in self.shards:
            for name, entry in read_header(shard).items():
                if name != "__metadata__":
                    yield name, tuple(entry["shape"])

    @property
    def context_length(self) -> int:
        """How many tokens the model reads; 1 Mi where its config does not say."""
        source = self.text_config
        return int(source.get("max_position_embeddings") or source.get("n_positions") or 1_048_576)


def open_model_folder(path: Path, name: str) -> ModelFolder:
    """Check a folder. Raises TrainingFailed: model_not_found, or model_incomplete naming the missing file."""
    if not path.is_dir():
        raise TrainingFailed(
            ErrorCode.MODEL_NOT_FOUND,
            f"the base model {name} is not on this host ({path} is no folder)",
            "download it with `brightrun-trainer models pull`, or correct the model's name",
        )
    config = _read_json(path / "config.json", name)
    kept_copy = _kept_copy(path)
    shards = () if kept_copy is not None else _shards(path, name)
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise _incomplete(name, "has no tokenizer (tokenizer.json or tokenizer.model)")
    return ModelFolder(path, config, shards, kept_copy)


def read_header(shard: Path) -> dict[str, Any]:
    """The JSON that a safetensors file begins with. Raises ValueError where it does not."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Half a GiB of names is more than any model has; a damaged length must not make us read the whole file.
        if size < 8 or length > min(size - 8, 512 * 1024**2):
            raise ValueError(f"{shard.name} is truncated ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{shard.name} has an unreadable header") from None
    if not isinstance(header, dict):
        raise ValueError(f"{shard.name} has an unreadable header")
    return header


def _kept_copy(path: Path) -> Path | None:
    """The copy in the folder, unless there are 16-bit weights, which count before it."""
    if (path / "model.safetensors.index.json").is_file() or (path / "model.safetensors").is_file():
        return None
    return path / KEPT_COPY if (path / KEPT_COPY / COPY_MANIFEST).is_file() else None


def _shards(path: Path, name: str) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index, name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _incomplete(name, f"{index.name} lists no weights")
        shards = tuple(path / file for file in sorted(set(map(str, weight_map.values()))))
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise _incomplete(name, f"misses {len(missing)} of {len(shards)} weight files: {', '.join(missing[:5])}")
    else:
        shards = tuple(sorted(path.glob("*.safetensors")))
        if not shards:
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
            raise _incomplete(
                name, "holds only pickled weights, which are never loaded" if pickled else "holds no *.safetensors file"
            )
    for shard in shards:
        _check_header(shard, name)
    return shards


def _check_header(shard: Path, name: str) -> None:
    """A download that broke off leaves a file shorter than its own header says."""
    try:
        header = read_header(shard)
    except ValueError as error:
        raise _incomplete(name, f"is damaged: {error}") from None
    data = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    size = shard.stat().st_size
    with shard.open("rb") as file:
        whole = 8 + int.from_bytes(file.read(8), "little") + data
    if size != whole:
        raise _incomplete(name, f"is damaged: {shard.name} has {size} bytes of {whole}")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _incomplete(name, f"has no {path.name}") from None
    except ValueError as error:
        raise _incomplete(name, f"{path.name} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise _incomplete(name, f"{path.name} is not a JSON object")
    return found


def _incomplete(name: str, what: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.MODEL_INCOMPLETE,
        f"the base model {name} {what}",
        "download the model again (`brightrun-trainer models verify` names every damaged file)",
    )
