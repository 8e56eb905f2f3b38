"""Lists the base models of this host, and whether each is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.base_model.candidates import (
    Where,
    _cache_roots,
    _Candidate,
    _candidates,
    _looks_like_model,
    _marked_as,
    _not_found,
    _revision_of,
    _snapshot_of,
    checked_name,
)
from daemon.base_model.files import model_bytes, verify_hashes
from daemon.settings import Settings
from training.files.model_folder import faults_of_model, read_config


@dataclass(frozen=True)
class FoundModel:
    """A line of `models list`: a folder and its faults, if any."""

    name: str
    path: Path
    where: Where
    bytes: int
    revision: str | None
    faults: tuple[str, ...]


def list_models(settings: Settings) -> list[FoundModel]:
    """Lists every model folder that `resolve_model` would look at, by name."""
    found: dict[Path, FoundModel] = {}
    for name, candidate in _all_folders(settings):
        path = candidate.path
        if path.resolve() in found:
            continue
        faults = tuple(faults_of_model(path))
        found[path.resolve()] = FoundModel(
            name, path, candidate.where, model_bytes(path), _revision_of(candidate), faults
        )
    return sorted(found.values(), key=lambda model: (model.name.lower(), str(model.path)))


def verify_model(
    name: str, settings: Settings, on_file: Callable[[str, int], None] = lambda _name, _bytes: None
) -> list[str]:
    """Lists every fault of the folder that this name resolves to, and verifies the hashes that are known.

    Raises JobFailed(model_not_found) if there is no such folder.
    """
    checked_name(name, settings)
    for candidate in _candidates(name, settings):
        return faults_of_model(candidate.path) + verify_hashes(candidate.path, on_file)
    raise _not_found(name, settings)


def _all_folders(settings: Settings) -> Iterator[tuple[str, _Candidate]]:
    for depth in ("*", "*/*"):
        for path in sorted(settings.models_dir.glob(depth)):
            inside = path.relative_to(settings.models_dir)
            if not any(part.startswith(".") for part in inside.parts) and _looks_like_model(path):
                yield _marked_as(path) or inside.as_posix(), _Candidate(path, "models_dir")
    if settings.model_path is not None and _looks_like_model(settings.model_path):
        path = settings.model_path
        yield _marked_as(path) or read_config(path).get("_name_or_path") or path.name, _Candidate(path, "model_path")
    for root in _cache_roots(settings):
        for repo in sorted(root.glob("models--*")):
            snapshot = _snapshot_of(repo)
            if snapshot is not None:
                yield repo.name.removeprefix("models--").replace("--", "/"), _Candidate(snapshot, "cache")
