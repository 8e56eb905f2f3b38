"""Lists the places on this host where a base model may be: the models folder, MODEL_PATH, the Hugging Face cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from daemon.base_model.files import read_marker
from daemon.errors import JobFailed
from daemon.settings import Settings
from training.events import ErrorCode
from training.files.model_folder import KEPT_COPY, in_one_line, read_config
from training.spec import MODEL_NAME

Where = Literal["models_dir", "model_path", "cache", "hub"]


Progress = Callable[[int, int], None]  # bytes on disk, total bytes


@dataclass(frozen=True)
class ResolvedModel:
    """A whole model on this host. `revision` is the hub's commit, if known."""

    name: str
    path: Path
    revision: str | None
    where: Where


@dataclass(frozen=True)
class _Candidate:
    path: Path
    where: Where


def checked_name(name: str, settings: Settings) -> str:
    """Returns the name if it is valid (never a path) and the operator allows it."""
    if not re.fullmatch(MODEL_NAME, name) or ".." in name or "--" in name:
        raise JobFailed(
            ErrorCode.INVALID_SPEC,
            f"{name[:200]!r} is not a model name",
            "name the model as the hub does, ORG/NAME; paths are not accepted",
        )
    if settings.allowed_models and name not in settings.allowed_models:
        raise JobFailed(
            ErrorCode.MODEL_NOT_FOUND,
            f"this service does not offer the model {name}",
            f"choose one of: {', '.join(settings.allowed_models)}",
        )
    return name


def _candidates(name: str, settings: Settings) -> Iterator[_Candidate]:
    """Folders that contain this model, whole or not, in the order that resolve.py gives."""
    short = name.rpartition("/")[2]
    for path in dict.fromkeys((settings.models_dir / name, settings.models_dir / short)):
        if _looks_like_model(path) and _marked_as(path) in (None, name):
            yield _Candidate(path, "models_dir")
    if settings.model_path is not None and _model_path_holds(settings.model_path, name):
        yield _Candidate(settings.model_path, "model_path")
    for root in _cache_roots(settings):
        repo = root / f"models--{name.replace('/', '--')}"
        snapshot = _snapshot_of(repo)
        if snapshot is not None:
            yield _Candidate(snapshot, "cache")


def _looks_like_model(path: Path) -> bool:
    """Whether a folder contains any file of a model. `<org>` itself, which has only folders, does not."""
    if not path.is_dir() or (path.name == KEPT_COPY and (path.parent / "config.json").is_file()):
        return False
    return any(
        entry.name in ("config.json", "config.json.part") or entry.suffix == ".safetensors" or read_marker(path)
        for entry in path.iterdir()
    )


def _marked_as(path: Path) -> str | None:
    marker = read_marker(path)
    return marker.model if marker else None


def _model_path_holds(path: Path, name: str) -> bool:
    if not path.is_dir():
        return False
    marked = _marked_as(path)
    if marked is not None:
        return marked == name
    org, _, short = name.rpartition("/")
    if org and path.name == short and path.parent.name not in ("", org):
        # …/<name> is accepted unless config.json names another model.
        return read_config(path).get("_name_or_path") in (None, "", name, short)
    flat_names = (short, name.replace("/", "--"), name.replace("/", "_"), f"models--{name.replace('/', '--')}")
    return path.name in flat_names or read_config(path).get("_name_or_path") == name


def _cache_roots(settings: Settings) -> Iterator[Path]:
    for root in (settings.transformers_cache, settings.hf_home):
        if root is not None:
            yield root / "hub"
            yield root


def _snapshot_of(repo: Path) -> Path | None:
    """The snapshot that refs/main names; without refs/main, the only one there is."""
    snapshots = repo / "snapshots"
    with contextlib.suppress(OSError):
        named = snapshots / (repo / "refs" / "main").read_text().strip()
        if named.is_dir() and named != snapshots:
            return named
    there = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    return there[0] if len(there) == 1 else None


def _resolved(name: str, candidate: _Candidate) -> ResolvedModel:
    return ResolvedModel(name, candidate.path, _revision_of(candidate), candidate.where)


def _revision_of(candidate: _Candidate) -> str | None:
    return candidate.path.name if candidate.where == "cache" else revision_in(candidate.path)


def revision_in(folder: Path) -> str | None:
    """The hub's commit that a folder was downloaded from, if a note in it says."""
    marker = read_marker(folder)
    if marker is not None:
        return marker.revision
    # The hub's own client writes this beside files that it downloads into a flat folder.
    with contextlib.suppress(OSError, IndexError):
        note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
        return note.read_text().splitlines()[0]
    return None


def _raise_if_incomplete(name: str, path: Path, faults: list[str]) -> None:
    if not faults:
        return
    raise JobFailed(
        ErrorCode.MODEL_INCOMPLETE,
        f"the model {name} is incomplete on this host: {in_one_line(faults)}",
        f"the operator can run `brightrun-trainer models pull {name}` to complete it, or remove its folder",
        detail=f"it is in {path}",
    )


def _not_found(name: str, settings: Settings) -> JobFailed:
    looked = [str(settings.models_dir / name), str(settings.models_dir / name.rpartition("/")[2])]
    if settings.model_path is not None:
        looked.append(f"{settings.model_path} (MODEL_PATH; it does not say that it holds this model)")
    looked += [str(root) for root in _cache_roots(settings)]
    return JobFailed(
        ErrorCode.MODEL_NOT_FOUND,
        f"the model {name} is not on this host",
        f"check the name, or ask the operator to run `brightrun-trainer models pull {name}`",
        detail=f"it was looked for in {', '.join(dict.fromkeys(looked))}",
    )
