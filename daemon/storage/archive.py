"""Packs an adapter folder into an archive with a manifest, and unpacks it again.

Packing is reproducible: the same folder gives the same bytes. A daemon that was killed in the middle packs
again, finds its own objects by size and hash, and continues after the last one that is whole. Names carry
the lease's epoch, so that a host that lost the job cannot overwrite its successor's objects.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import structlog

from daemon.errors import JobFailed, TrainerError, disk_fault
from training.events import ErrorCode
from training.files.durable_files import READ_BYTES, beside, put_in_place, sha256_of

log = structlog.get_logger()

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")


# Formats that can run code when they are loaded.
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

# A file, or a file in a folder: a tokenizer with several chat templates keeps them in a folder.
_SAFE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?$")
# LoRA weights hardly compress; a higher level costs minutes and saves one percent.
_GZIP_LEVEL = 1
MAX_MEMBERS = 1000
MAX_UNPACKED_BYTES = 64 * 1024**3


class ArchiveInvalid(TrainerError):
    """The archive is not an adapter of ours, is damaged, or contains something that must not be unpacked."""


@dataclass(frozen=True)
class PackedFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """An archive on disk and its contents. `manifest` is the JSON document that is stored beside the archive."""

    archive: PackedFile
    path: Path
    files: tuple[PackedFile, ...]
    manifest: bytes


def pack_adapter(adapter_dir: Path, archive: Path, manifest_facts: Mapping[str, Any]) -> Packed:
    """Writes the folder as tar.gz, sorted, without times, owners or links; the manifest is its last member.

    Raises JobFailed(internal) when the folder lacks the weights or contains what must not be packed.
    """
    names = _names_to_pack(adapter_dir)
    files: list[PackedFile] = []
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with beside(archive) as hidden:
            with (
                hidden.open("wb") as raw,
                gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=_GZIP_LEVEL, mtime=0) as zipped,
                tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT, bufsize=READ_BYTES) as tar,
            ):
                for name in names:
                    files.append(_add_file(tar, adapter_dir / name, name))
                inner = _manifest(manifest_facts, files)
                tar.addfile(_member(MANIFEST, len(inner)), io.BytesIO(inner))
            packed = PackedFile(archive.name, hidden.stat().st_size, sha256_of(hidden))
            put_in_place(hidden, archive)
    except OSError as error:
        raise disk_fault("work folder", archive.parent, error) from error
    return Packed(packed, archive, tuple(files), _manifest(manifest_facts, files, packed))


def unpack_adapter(archive: Path, to: Path) -> dict[str, Any]:
    """Unpacks an archive of ours into a new folder, whole or not at all, and returns its manifest.

    Every member is checked before it is written and hashed while it is written: it must be a plain file with a plain
    name, listed in the manifest with its size and hash. Raises ArchiveInvalid, or FileExistsError if `to` is not empty.
    """
    if to.exists() and any(to.iterdir()):
        raise FileExistsError(f"{to} is not empty")
    try:
        with beside(to) as hidden:
            hidden.mkdir(parents=True)
            files = _unpack_members(archive, hidden)
            manifest = _read_manifest(hidden / MANIFEST, files)
            if to.exists():
                to.rmdir()
            put_in_place(hidden, to)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ArchiveInvalid(f"{archive.name} is damaged: {error}") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ArchiveInvalid(f"{archive.name} has a name that is both file and folder") from error
    return manifest


def _unpack_members(archive: Path, folder: Path) -> dict[str, PackedFile]:
    files: dict[str, PackedFile] = {}
    left = MAX_UNPACKED_BYTES
    with tarfile.open(archive, mode="r|gz", bufsize=READ_BYTES) as tar:
        for member in tar:
            if not member.isreg():
                raise ArchiveInvalid(f"the member {member.name!r} is a link, folder or device, not a plain file")
            if not _SAFE_NAME.fullmatch(member.name) or member.name in files:
                raise ArchiveInvalid(f"the member name {member.name!r} is not a plain name, or occurs twice")
            if Path(member.name).suffix in PICKLES:
                raise ArchiveInvalid(f"the member {member.name!r} may run code when it is loaded")
            left -= member.size
            if left < 0 or len(files) >= MAX_MEMBERS:
                raise ArchiveInvalid("the archive has more files or bytes than any adapter")
            if not _stays_inside(member, folder):
                raise ArchiveInvalid(f"the member {member.name!r} would be written outside the folder")
            content = tar.extractfile(member)
            assert content is not None
            files[member.name] = _write_hashed(content, folder, member.name)
    return files


def _stays_inside(member: tarfile.TarInfo, folder: Path) -> bool:
    """The standard library's own check of a member, in addition to ours."""
    # Python 3.11 has it since 3.11.4; Debian 12 ships 3.11.2.
    if not hasattr(tarfile, "data_filter"):
        return True
    try:
        # The filter makes an absolute name relative instead of refusing it; no honest archive has one.
        return tarfile.data_filter(member, str(folder)).name == member.name
    except tarfile.FilterError:
        return False


def _write_hashed(content: IO[bytes], folder: Path, name: str) -> PackedFile:
    digest, size = hashlib.sha256(), 0
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    with target.open("xb") as file:
        while piece := content.read(READ_BYTES):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return PackedFile(name, size, digest.hexdigest())


def _read_manifest(file: Path, unpacked: Mapping[str, PackedFile]) -> dict[str, Any]:
    if file.name not in unpacked:
        raise ArchiveInvalid("the archive has no manifest.json: it was not made by this service")
    try:
        manifest = json.loads(file.read_bytes())
        promised = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArchiveInvalid(f"manifest.json cannot be read: {error}") from error
    found = {file.name: (file.bytes, file.sha256) for file in unpacked.values() if file.name != MANIFEST}
    different = sorted(name for name in promised.keys() | found.keys() if promised.get(name) != found.get(name))
    if different:
        raise ArchiveInvalid(f"these files differ from the manifest: {', '.join(different)}")
    return dict(manifest)


def _names_to_pack(adapter_dir: Path) -> list[str]:
    """Lists the folder's files in the archive's order. A manifest in the folder is skipped: we write our own."""
    if not adapter_dir.is_dir():
        raise _not_an_adapter(f"there is no adapter folder at {adapter_dir.name}")
    names = []
    for entry in sorted(adapter_dir.rglob("*")):
        name = entry.relative_to(adapter_dir).as_posix()
        if name == MANIFEST or (entry.is_dir() and not entry.is_symlink()):
            continue
        if entry.is_symlink() or not entry.is_file():
            raise _not_an_adapter(f"the adapter folder holds {name!r}, which is not a plain file")
        if not _SAFE_NAME.fullmatch(name):
            raise _not_an_adapter(f"the adapter folder holds a file with the name {name!r}")
        if entry.suffix in PICKLES:
            raise _not_an_adapter(f"the adapter folder holds {name!r}, which may run code when it is loaded")
        names.append(name)
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise _not_an_adapter(f"the adapter folder lacks {', '.join(missing)}")
    return names


def _add_file(tar: tarfile.TarFile, file: Path, name: str) -> PackedFile:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        hashing = _Hashing(stream)
        tar.addfile(_member(name, size), hashing)
    return PackedFile(name, size, hashing.digest.hexdigest())


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mtime = 0
    member.mode = 0o644
    return member


class _Hashing(io.RawIOBase):
    """A file that hashes what is read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self.digest.update(piece)
        return piece


def _manifest(facts: Mapping[str, Any], files: list[PackedFile], archive: PackedFile | None = None) -> bytes:
    document: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        **facts,
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
    }
    if archive is not None:
        document["archive"] = {"name": archive.name, "bytes": archive.bytes, "sha256": archive.sha256}
    return json.dumps(_finite(document), indent=2, sort_keys=True, default=str).encode()


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity by null: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _not_an_adapter(message: str) -> JobFailed:
    return JobFailed(
        ErrorCode.INTERNAL, message, "this is a fault of the service, not of your job; report it with the job's id"
    )
