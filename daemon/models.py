"""Finds the base model that a job asked for, exactly that one and never another.

Looked for in this order; the first folder that holds the model decides:

1. `TRAINER_MODELS_DIR/<org>/<name>`, then `…/<name>`
2. `MODEL_PATH`, when it holds the requested model
3. the Hugging Face cache under TRANSFORMERS_CACHE and HF_HOME: `[hub/]models--ORG--NAME/snapshots/HASH`
4. the hub, when TRAINER_MODEL_DOWNLOADS allows it and the disk has room

How a folder says what it holds: by the marker that `models pull` writes (it outweighs everything), else by
its path ending in `<org>/<name>` (or being named `<org>--<name>`), else, for MODEL_PATH, by its own name or
by `_name_or_path` in config.json. `…/<name>` without an org is taken by its name, as the operator put it
there. A folder that is found but not whole is an error that names the shard, not a reason to look elsewhere:
silently downloading 160 GB beside an interrupted copy has filled disks before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import structlog

from daemon.errors import HostFault, JobDelayed, JobError, JobFailed
from daemon.hub import Order, bytes_on_disk
from daemon.model_files import KEPT_COPY, faults_of_model, model_bytes, read_config, read_marker, verify_hashes
from daemon.settings import Settings
from training.events import ErrorCode
from training.spec import MODEL_NAME

log = structlog.get_logger()

Where = Literal["models_dir", "model_path", "cache", "hub"]
Progress = Callable[[int, int], None]  # bytes on disk, bytes in all

PROGRESS_SECONDS = 1.0
# What the download process needs of our environment; none of it is secret.
_INHERITED = re.compile(r"^(PATH|HOME|LANG|LC_.*|TMPDIR|PYTHONPATH|VIRTUAL_ENV|HF_ENDPOINT|HF_HUB_.*|SSL_CERT_.*"
                        r"|HTTPS?_PROXY|NO_PROXY|https?_proxy|no_proxy)$")  # fmt: skip


@dataclass(frozen=True)
class ResolvedModel:
    """A whole model on this host. `revision` is the hub's commit where that is known."""

    name: str
    path: Path
    revision: str | None
    where: Where


@dataclass(frozen=True)
class FoundModel:
    """A line of `models list`: a folder, whole or with its faults."""

    name: str
    path: Path
    where: Where
    bytes: int
    revision: str | None
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    path: Path
    where: Where


_downloads: dict[Path, asyncio.Lock] = {}


async def resolve_model(
    name: str | None, settings: Settings, on_progress: Progress = lambda _done, _total: None
) -> ResolvedModel:
    """The model, on disk and whole; the default model when `name` is None.

    Raises JobFailed: invalid_spec (no model's name), model_not_found (not allowed, or nowhere),
    model_incomplete (found, with a shard or file missing or cut); JobDelayed: disk_full, or
    model_not_found when the hub does not answer.
    """
    name = checked_name(name or settings.default_model, settings)
    found = await asyncio.to_thread(_find, name, settings)
    if found is not None:
        log.info("model_resolved", model=name, where=found.where, path=str(found.path), revision=found.revision)
        return found
    if not settings.model_downloads:
        raise _not_found(name, settings)
    return await pull_model(name, settings, on_progress)


async def pull_model(
    name: str, settings: Settings, on_progress: Progress = lambda _done, _total: None
) -> ResolvedModel:
    """Download from the hub into TRAINER_MODELS_DIR/<org>/<name>, going on from what is there. Raises as above."""
    checked_name(name, settings)
    target = settings.models_dir / name
    async with _downloads.setdefault(target, asyncio.Lock()):
        # Another job may have waited for the same model before us.
        if await asyncio.to_thread(_is_pulled, target, name):
            return _resolved(name, _Candidate(target, "models_dir"))
        log.info("model_download_started", model=name, target=str(target))
        answer = await _run_download(name, target, settings, on_progress)
        if answer.get("kind") != "done":
            raise _download_error(name, settings, str(answer.get("why")), str(answer.get("message")))
        _raise_if_incomplete(name, target, await asyncio.to_thread(faults_of_model, target))
        log.info("model_download_ended", model=name, revision=answer.get("revision"))
        return _resolved(name, _Candidate(target, "hub"))


def list_models(settings: Settings) -> list[FoundModel]:
    """Every model folder that resolution would look at, by name."""
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
    """Every fault of the folder that this name resolves to, hashes read where they are known.

    Raises JobFailed(model_not_found) when there is no such folder.
    """
    checked_name(name, settings)
    for candidate in _candidates(name, settings):
        return faults_of_model(candidate.path) + verify_hashes(candidate.path, on_file)
    raise _not_found(name, settings)


def checked_name(name: str, settings: Settings) -> str:
    """The name itself, if it is one (never a path) and the operator allows it."""
    if not re.fullmatch(MODEL_NAME, name) or ".." in name or "--" in name:
        raise JobFailed(
            ErrorCode.INVALID_SPEC,
            f"{name[:200]!r} is not a model's name",
            "name a model as the hub does, ORG/NAME; paths are not accepted",
        )
    if settings.allowed_models and name not in settings.allowed_models:
        raise JobFailed(
            ErrorCode.MODEL_NOT_FOUND,
            f"model {name} is not offered here",
            f"choose one of: {', '.join(settings.allowed_models)}",
        )
    return name


def _find(name: str, settings: Settings) -> ResolvedModel | None:
    for candidate in _candidates(name, settings):
        marker = read_marker(candidate.path)
        if marker is not None and not marker.complete and settings.model_downloads:
            # Our own pull, interrupted: it is resumed, not reported.
            return None
        _raise_if_incomplete(name, candidate.path, faults_of_model(candidate.path))
        return _resolved(name, candidate)
    return None


def _candidates(name: str, settings: Settings) -> Iterator[_Candidate]:
    """Folders that hold this model, whole or not, in the order of the head of this file."""
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
    """A folder with anything of a model in it; `<org>` itself, which holds only folders, is none."""
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
        # …/<name>: believed unless config.json says that it is another's.
        return read_config(path).get("_name_or_path") in (None, "", name, short)
    flat_names = (short, name.replace("/", "--"), name.replace("/", "_"), f"models--{name.replace('/', '--')}")
    return path.name in flat_names or read_config(path).get("_name_or_path") == name


def _cache_roots(settings: Settings) -> Iterator[Path]:
    for root in (settings.transformers_cache, settings.hf_home):
        if root is not None:
            yield root / "hub"
            yield root


def _snapshot_of(repo: Path) -> Path | None:
    """The snapshot that refs/main names; without it the only one there is."""
    snapshots = repo / "snapshots"
    with contextlib.suppress(OSError):
        named = snapshots / (repo / "refs" / "main").read_text().strip()
        if named.is_dir() and named != snapshots:
            return named
    there = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    return there[0] if len(there) == 1 else None


def _is_pulled(target: Path, name: str) -> bool:
    marker = read_marker(target)
    return marker is not None and marker.complete and marker.model == name and not faults_of_model(target)


def _resolved(name: str, candidate: _Candidate) -> ResolvedModel:
    return ResolvedModel(name, candidate.path, _revision_of(candidate), candidate.where)


def _revision_of(candidate: _Candidate) -> str | None:
    if candidate.where == "cache":
        return candidate.path.name
    marker = read_marker(candidate.path)
    if marker is not None:
        return marker.revision
    # What the hub's own client leaves beside files that it put into a flat folder.
    with contextlib.suppress(OSError, IndexError):
        note = candidate.path / ".cache" / "huggingface" / "download" / "config.json.metadata"
        return note.read_text().splitlines()[0]
    return None


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


async def _run_download(name: str, target: Path, settings: Settings, on_progress: Progress) -> dict[str, object]:
    """Run daemon.hub to its answer; cancelling ends the process, what it downloaded stays."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "daemon.hub",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if _INHERITED.match(key)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    watching: asyncio.Task[None] | None = None
    answer: dict[str, object] = {}
    try:
        process.stdin.write(json.dumps(asdict(Order(name, str(target), token))).encode() + b"\n")
        await process.stdin.drain()
        async for line in process.stdout:
            answer = json.loads(line)
            if answer["kind"] == "plan":
                total = int(str(answer["total_bytes"]))
                log.info("model_download_planned", model=name, bytes=total, missing_bytes=answer["missing_bytes"])
                watching = asyncio.create_task(_watch(target, total, on_progress))
        await process.wait()
    finally:
        if watching is not None:
            watching.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
    if answer.get("kind") not in ("done", "failed"):
        message = f"the download of {name} ended early (exit status {process.returncode})"
        return {"kind": "failed", "why": "network", "message": message}
    return answer


async def _watch(target: Path, total: int, on_progress: Progress) -> None:
    while True:
        try:
            on_progress(min(await asyncio.to_thread(bytes_on_disk, target), total), total)
        except OSError as error:
            log.debug("model_download_not_measured", error=str(error))  # a file was moved to its place meanwhile
        await asyncio.sleep(PROGRESS_SECONDS)


def _raise_if_incomplete(name: str, path: Path, faults: list[str]) -> None:
    if not faults:
        return
    listed = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
    raise JobFailed(
        ErrorCode.MODEL_INCOMPLETE,
        f"model {name} in {path} is not whole: {listed}",
        f"the operator completes it with `brightrun-trainer models pull {name}`, or removes the folder",
    )


def folders_exist(settings: Settings) -> bool:
    """Whether any of the folders is there that models may lie in. Without one it is no model that is missing, but the
    volume."""
    places = (settings.models_dir, settings.model_path, *_cache_roots(settings))
    return any(place is not None and place.is_dir() for place in places)


def _not_found(name: str, settings: Settings) -> JobFailed:
    looked = [str(settings.models_dir / name), str(settings.models_dir / name.rpartition("/")[2])]
    if settings.model_path is not None:
        looked.append(f"{settings.model_path} (MODEL_PATH; it does not say that it holds this model)")
    looked += [str(root) for root in _cache_roots(settings)]
    return JobFailed(
        ErrorCode.MODEL_NOT_FOUND,
        f"model {name} is not on this host; looked in {', '.join(dict.fromkeys(looked))}",
        f"the operator fetches it with `brightrun-trainer models pull {name}`, or check the name",
    )


def _download_error(name: str, settings: Settings, why: str, message: str) -> JobError:
    match why:
        case "absent":
            return JobFailed(ErrorCode.MODEL_NOT_FOUND, message, "check base_model; private models need HF_TOKEN")
        case "unusable":
            return JobFailed(ErrorCode.MODEL_UNSUPPORTED, message, "choose a model that is published as safetensors")
        case "disk":
            return HostFault(
                "models folder",
                ErrorCode.DISK_FULL,
                f"The models folder of the host has no room for {name}.",
                detail=f"{message}; free space under {settings.models_dir}, or set TRAINER_MODELS_DIR to a larger disk",
            )
        case _:
            hint = "the download goes on from here at the next attempt; check the host's way to huggingface.co"
            return JobDelayed(ErrorCode.MODEL_NOT_FOUND, f"{name}: {message}", hint)
