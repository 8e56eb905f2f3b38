"""Saves and finds checkpoints: written to a temporary folder, hashed, renamed; two are kept, verified before use."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.failures import in_brief
from training.files.durable_files import put_in_place, sha256_of

_MANIFEST = "manifest.json"
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk with verified hashes."""

    path: Path
    step: int
    bytes: int


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that must not be used, and why."""

    path: Path
    reason: str


class CheckpointShelf:
    """The folder that outlives attempts. Holds `checkpoint-<step>` folders, each complete or absent."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """`fingerprint` identifies a checkpoint's run: data, settings, base model. JSON, compared exactly."""
        self._folder = folder
        self._fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))

    @property
    def staging(self) -> Path:
        """Where the next checkpoint is written before it is published."""
        return self._folder / ".staging"

    def prepare(self) -> Path:
        """Empties the staging folder: a killed attempt may have left files in it."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        return self.staging

    def publish(self, written: Path, step: int) -> Checkpoint:
        """Hashes what was written, syncs it to disk, gives it its final name, and deletes all but the newest two."""
        files = {}
        total = 0
        for path in sorted(written.rglob("*")):
            if path.is_file():
                files[str(path.relative_to(written))] = sha256_of(path)
                total += path.stat().st_size
        manifest = {"step": step, "files": files, "fingerprint": self._fingerprint}
        (written / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        final = self._folder / f"checkpoint-{step}"
        put_in_place(written, final)
        for older in self._stored()[_KEPT:]:
            shutil.rmtree(older, ignore_errors=True)
        return Checkpoint(final, step, total)

    def newest(self) -> tuple[Checkpoint | None, list[Damaged]]:
        """Returns the newest complete checkpoint of this run, and the damaged ones that were skipped."""
        passed_over: list[Damaged] = []
        for path in self._stored():
            found = self._check(path)
            if isinstance(found, Checkpoint):
                return found, passed_over
            passed_over.append(found)
        return None, passed_over

    def clear(self) -> None:
        """Removes everything, once the run is over and its adapter is written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stored(self) -> list[Path]:
        found = [path for path in self._folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)

    def _check(self, path: Path) -> Checkpoint | Damaged:
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            files: dict[str, str] = manifest["files"]
            step = int(manifest["step"])
            fingerprint = manifest["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Damaged(path, f"its manifest cannot be read ({in_brief(error)})")
        if fingerprint != self._fingerprint:
            differing = [key for key in self._fingerprint if fingerprint.get(key) != self._fingerprint[key]]
            return Damaged(path, f"it belongs to another run ({', '.join(differing) or 'other keys'} differ)")
        total = 0
        for name, expected in files.items():
            file = path / name
            try:
                if sha256_of(file) != expected:
                    return Damaged(path, f"{name} has a different hash than when it was written")
                total += file.stat().st_size
            except OSError as error:
                return Damaged(path, f"{name} cannot be read ({error.strerror})")
        return Checkpoint(path, step, total)
