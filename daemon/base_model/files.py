"""Whether a folder holds a whole model: config, tokenizer, every shard that the index names, each to its last byte.

Sizes come from the safetensors headers, so a download that was cut is found without reading the weights.
Hashes are compared where the folder knows them: our own marker, or a Hugging Face cache, whose blobs are
named by their sha256.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from daemon.atomic_files import sha256_of

MARKER = ".brightrun-model.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# Where `models quantize --replace` leaves the 4-bit copy, alone (training.files.model_folder has the same names).
KEPT_COPY = "nf4"
COPY_MANIFEST = "manifest.json"

# Any one of these sets carries a vocabulary.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("vocab.txt",),
    ("tekken.json",),
)
# The largest real header (a hundred thousand tensors) is about 15 MB.
_MAX_HEADER_BYTES = 100_000_000
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Marker:
    """What we wrote into a folder that we filled: which model it is, and the hash of each file if known."""

    model: str
    revision: str | None = None
    complete: bool = True
    sha256: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        hidden = folder / f"{MARKER}.part"
        hidden.write_text(json.dumps(asdict(self), indent=2, sort_keys=True))
        hidden.replace(folder / MARKER)


def read_marker(folder: Path) -> Marker | None:
    """None when there is none, or none that can be read."""
    try:
        return Marker(**json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, {} when it cannot be read (`faults_of_model` says so)."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def faults_of_model(folder: Path) -> list[str]:
    """Everything that keeps the folder from being a whole model, in words, shard by name; [] when it is whole."""
    faults = []
    if not (folder / "config.json").is_file():
        faults.append("config.json is missing")
    elif not read_config(folder):
        faults.append("config.json is not a JSON object")
    tiktoken = any(folder.glob("*.tiktoken"))
    if not tiktoken and not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        faults.append("no tokenizer files (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    return faults + _faults_of_weights(folder)


def verify_hashes(folder: Path, on_file: Callable[[str, int], None] = lambda _name, _bytes: None) -> list[str]:
    """Read every file whose hash is known and name those that differ. `on_file` gets each name and size first."""
    faults = []
    for name, expected in sorted(_known_hashes(folder).items()):
        file = folder / name
        if not file.is_file():
            faults.append(f"{name} is missing")
            continue
        on_file(name, file.stat().st_size)
        if sha256_of(file) != expected:
            faults.append(f"{name} is damaged: its sha256 is not {expected[:12]}…")
    return faults


def model_bytes(folder: Path) -> int:
    """Size of the weights, links followed."""
    weights = [*folder.glob("*.safetensors"), *(folder / KEPT_COPY).glob("*.safetensors")]
    return sum(file.stat().st_size for file in weights if file.is_file())


def keeps_copy_only(folder: Path) -> bool:
    """True when a 4-bit copy stands in place of the weights; 16-bit weights beside it count before it."""
    has_weights = (folder / INDEX).exists() or (folder / WEIGHTS).exists()
    return not has_weights and (folder / KEPT_COPY / COPY_MANIFEST).is_file()


def read_copy_manifest(copy: Path) -> dict[str, Any]:
    """What the trainer wrote beside a 4-bit copy. Raises OSError, ValueError, KeyError or TypeError."""
    manifest = dict(json.loads((copy / COPY_MANIFEST).read_text(encoding="utf-8")))
    return {
        "files": {str(name): str(digest) for name, digest in manifest["files"].items()},
        "tensors": {str(name): tuple(shape) for name, shape in manifest["tensors"].items()},
        "versions": dict(manifest["fingerprint"]["versions"]),
    }


def faults_of_copy(copy: Path) -> list[str]:
    """What keeps a 4-bit copy from being used: a file missing or cut, or other libraries than those that made it."""
    try:
        manifest = read_copy_manifest(copy)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"the 4-bit copy's {COPY_MANIFEST} cannot be read ({type(error).__name__})"]
    faults = [fault for name in sorted(manifest["files"]) for fault in _faults_of_shard(copy / name, None)]
    for library, made_with in sorted(manifest["versions"].items()):
        with contextlib.suppress(PackageNotFoundError):
            if (here := version(library)) != made_with:
                faults.append(f"the 4-bit copy was made with {library} {made_with}, and {here} is installed")
    return faults


def _faults_of_weights(folder: Path) -> list[str]:
    index = folder / INDEX
    if keeps_copy_only(folder):
        return faults_of_copy(folder / KEPT_COPY)
    if index.exists():
        return _faults_of_shards(folder, index)
    if (folder / WEIGHTS).exists():
        return list(_faults_of_shard(folder / WEIGHTS, None))
    # A link of a Hugging Face cache whose blob is gone exists as a link only.
    if (folder / INDEX).is_symlink() or (folder / WEIGHTS).is_symlink():
        return ["the weights are a link to a file that is gone"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return ["only pickled weights (.bin, .pt); safetensors are needed, pickles are never loaded"]
    return [f"no weights ({WEIGHTS} or {INDEX})"]


def _faults_of_shards(folder: Path, index: Path) -> list[str]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{INDEX} cannot be read ({type(error).__name__})"]
    by_shard: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        by_shard.setdefault(str(shard), set()).add(tensor)
    faults: list[str] = []
    for shard, tensors in sorted(by_shard.items()):
        if "/" in shard or shard.startswith("."):
            faults.append(f"{INDEX} names a shard outside the folder: {shard}")
        else:
            faults += _faults_of_shard(folder / shard, tensors)
    return faults


def _faults_of_shard(file: Path, expected_tensors: set[str] | None) -> Iterator[str]:
    if not file.is_file():
        yield f"shard {file.name} is missing"
        return
    size = file.stat().st_size
    try:
        header_bytes, header = _read_header(file)
        tensors = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        yield f"shard {file.name} ({size:,} bytes) has no readable safetensors header"
        return
    whole = 8 + header_bytes + max(tensors.values(), default=0)
    if size != whole:
        yield f"shard {file.name} has {size:,} bytes of {whole:,}"
    missing = sorted((expected_tensors or set()) - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield f"shard {file.name} lacks the tensor {missing[0]}{more}"


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of a safetensors header. Raises OSError, ValueError or struct.error when there is none."""
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError("header too long")
        return header_bytes, dict(json.loads(stream.read(header_bytes)))


def weight_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a whole model folder, without reading the weights."""
    if keeps_copy_only(folder):
        yield from read_copy_manifest(folder / KEPT_COPY)["tensors"].items()
        return
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in _read_header(file)[1].items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"])


def _known_hashes(folder: Path) -> dict[str, str]:
    marker = read_marker(folder)
    known = dict(marker.sha256) if marker else {}
    if keeps_copy_only(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            files = read_copy_manifest(folder / KEPT_COPY)["files"]
            known |= {f"{KEPT_COPY}/{name}": digest for name, digest in files.items()}
    for file in folder.iterdir():
        if file.is_symlink() and _SHA256.fullmatch(file.readlink().name):
            known.setdefault(file.name, file.readlink().name)
    return known
