"""Reads and writes the marker of a model's folder, which says which model it is, and verifies the files' hashes.

Hashes are known from our own marker, or in a Hugging Face cache, whose blobs are named by their sha256.
`training.files.model_folder` decides whether a folder is whole, so that daemon and trainer agree.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from training.files.durable_files import sha256_of, write_whole
from training.files.model_folder import KEPT_COPY, keeps_copy_only, read_copy_manifest

MARKER = ".brightrun-model.json"
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Marker:
    """Our note in a folder that we filled: which model it is, and the hash of each file if known."""

    model: str
    revision: str | None = None
    complete: bool = True
    sha256: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_whole(folder / MARKER, json.dumps(asdict(self), indent=2, sort_keys=True))


def read_marker(folder: Path) -> Marker | None:
    """Reads the marker. None if there is none, or it cannot be read."""
    try:
        return Marker(**json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def verify_hashes(folder: Path, on_file: Callable[[str, int], None] = lambda _name, _bytes: None) -> list[str]:
    """Reads every file whose hash is known and names those that differ. `on_file` gets each name and size first."""
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
    """Size of the weights in bytes, following links."""
    weights = [*folder.glob("*.safetensors"), *(folder / KEPT_COPY).glob("*.safetensors")]
    return sum(file.stat().st_size for file in weights if file.is_file())


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
