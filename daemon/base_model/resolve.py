"""Finds the base model that a job asked for, exactly that one and never another.

It searches in this order, and uses the first folder that has the model:

1. `TRAINER_MODELS_DIR/<org>/<name>`, then `…/<name>`
2. `MODEL_PATH`, if it has the requested model
3. the Hugging Face cache under TRANSFORMERS_CACHE and HF_HOME: `[hub/]models--ORG--NAME/snapshots/HASH`
4. the hub, if TRAINER_MODEL_DOWNLOADS allows it and the disk has room

How we know which model a folder has: from the marker that `models pull` writes (it overrides everything), else
from a path that ends in `<org>/<name>` (or a name `<org>--<name>`), else, for MODEL_PATH, from its own name or
`_name_or_path` in config.json. `…/<name>` without an org is accepted by its name, because the operator put it
there. A folder that is found but not whole is an error that names the shard, not a reason to search elsewhere:
silently downloading 160 GB beside an interrupted copy has filled disks before.
"""

from __future__ import annotations

import asyncio

import structlog

from daemon.base_model.candidates import (
    Progress,
    ResolvedModel,
    _cache_roots,
    _candidates,
    _not_found,
    _raise_if_incomplete,
    _resolved,
    checked_name,
)
from daemon.base_model.files import read_marker
from daemon.base_model.pull import pull_model
from daemon.settings import Settings
from training.files.model_folder import faults_of_model

log = structlog.get_logger()


async def resolve_model(
    name: str | None, settings: Settings, on_progress: Progress = lambda _done, _total: None
) -> ResolvedModel:
    """Returns the model, on disk and whole; the default model if `name` is None.

    Raises JobFailed: invalid_spec (not a model name), model_not_found (not allowed, or not found),
    model_incomplete (a shard or file is missing or truncated); JobDelayed: disk_full, or
    model_not_found if the hub does not answer.
    """
    name = checked_name(name or settings.default_model, settings)
    found = await asyncio.to_thread(_find, name, settings)
    if found is not None:
        log.info("model_resolved", model=name, where=found.where, path=str(found.path), revision=found.revision)
        return found
    if not settings.model_downloads:
        raise _not_found(name, settings)
    return await pull_model(name, settings, on_progress)


def _find(name: str, settings: Settings) -> ResolvedModel | None:
    for candidate in _candidates(name, settings):
        marker = read_marker(candidate.path)
        if marker is not None and not marker.complete and settings.model_downloads:
            # Our own download was interrupted: continue it instead of reporting it.
            return None
        _raise_if_incomplete(name, candidate.path, faults_of_model(candidate.path))
        return _resolved(name, candidate)
    return None


def folders_exist(settings: Settings) -> bool:
    """Whether any folder that may contain models exists. If none does, the volume is missing, not a model."""
    places = (settings.models_dir, settings.model_path, *_cache_roots(settings))
    return any(place is not None and place.is_dir() for place in places)
