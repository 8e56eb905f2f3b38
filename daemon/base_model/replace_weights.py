"""Replaces a model's 16-bit weights by its 4-bit copy: verifies every byte of the copy, moves it into the model's
folder, and only then deletes the 16-bit weights.

The folder stays whole if this is killed at any moment: the 16-bit weights count as long as their index exists. The
copy is moved in first, and then the index is deleted before the shards. Calling it again finishes the work.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from daemon.base_model.files import read_marker
from daemon.errors import JobFailed
from training.events import ErrorCode
from training.files.durable_files import put_in_place, sha256_of, sync
from training.files.model_folder import INDEX, KEPT_COPY, WEIGHTS, faults_of_copy, read_copy_manifest


def weights_of(folder: Path) -> list[Path]:
    """The 16-bit files that a replacement deletes; first the index, without which the weights do not count."""
    first = [path for path in (folder / INDEX, folder / WEIGHTS) if path.is_file()]
    return first + sorted(path for path in folder.glob("*.safetensors") if path not in first)


def replace_weights(folder: Path, copy: Path) -> int:
    """Replaces the weights by the copy. Returns the bytes that were freed.

    Raises JobFailed(model_incomplete), and deletes nothing, if the copy differs from what was written or the folder is
    in the hub's cache, whose files other snapshots share.
    """
    if any(path.is_symlink() for path in weights_of(folder)):
        raise _refused(
            f"{folder} is a Hugging Face cache, whose files other revisions share; nothing was deleted",
            "`brightrun-trainer models pull` puts the model into TRAINER_MODELS_DIR, where it can be replaced",
        )
    kept = folder / KEPT_COPY
    if copy != kept:
        _check(copy)
        arriving = folder / f".{KEPT_COPY}.partial"
        shutil.rmtree(arriving, ignore_errors=True)
        # A rename on one volume, else a copy, which is verified like its source.
        shutil.move(copy, arriving)
        _check(arriving)
        put_in_place(arriving, kept)
    else:
        _check(kept)
    doomed = weights_of(folder)
    marker = read_marker(folder)
    if marker is not None:
        names = {path.name for path in doomed}
        replace(marker, sha256={name: h for name, h in marker.sha256.items() if name not in names}).write(folder)
    freed = 0
    for path in doomed:
        freed += path.stat().st_size
        path.unlink()
        # The index must be deleted on disk before the first shard.
        sync(folder)
    return freed


def _check(copy: Path) -> None:
    """Verifies every byte: afterwards the weights to make it again from are gone."""
    faults = faults_of_copy(copy)
    if not faults:
        files = read_copy_manifest(copy)["files"]
        faults = [
            f"{name} has a different hash than when it was written" for name in files if _differs(copy, files, name)
        ]
    if faults:
        raise _refused(
            f"the 4-bit copy in {copy} is incomplete: {faults[0]}; nothing was deleted",
            "remove that folder and run `brightrun-trainer models quantize` again",
        )


def _differs(copy: Path, files: dict[str, str], name: str) -> bool:
    return sha256_of(copy / name) != files[name]


def _refused(message: str, hint: str) -> JobFailed:
    return JobFailed(ErrorCode.MODEL_INCOMPLETE, message, hint)
