"""A folder while it is written: hidden beside its final place, named when it is whole, continued after a kill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.events import ErrorCode
from training.failures import TrainingFailed, is_disk_full
from training.files.durable_files import put_in_place, sha256_of, write_whole

_STATE = ".state.json"
_LOCK = ".lock"
# Volumes that cannot lock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written whole."""

    bytes: int
    sha256: str


class UnfinishedFolder:
    """Large files are recorded as they are done; the same work, begun again, keeps those that are still right."""

    def __init__(self, path: Path, final: Path, fingerprint: str) -> None:
        self.path = path
        self._final = final
        self._fingerprint = fingerprint
        self._files = self._kept()
        for entry in path.iterdir():
            if entry.name not in (*self._files, _LOCK, _STATE):
                _remove(entry)

    @classmethod
    @contextmanager
    def of(cls, final: Path, work: Mapping[str, Any]) -> Iterator[UnfinishedFolder]:
        """Opens the hidden folder of `final`. `work` tells whether what lies there is part of the same work.

        After TrainingFailed or an error of the disk nothing is left. Raises TrainingFailed if another process writes
        the same folder, or the place cannot be written.
        """
        path = final.with_name(f".{final.name}.part")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / _LOCK).open("w")
        except OSError as error:
            raise TrainingFailed(
                ErrorCode.INVALID_SPEC,
                f"the folder {final} cannot be made: {error.strerror or error}",
                "name a folder where this user may write",
            ) from error
        with lock:
            _take(lock.fileno(), final)
            try:
                yield cls(path, final, hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest())
            except TrainingFailed:
                shutil.rmtree(path, ignore_errors=True)
                raise
            except OSError as error:
                if is_disk_full(error):
                    shutil.rmtree(path, ignore_errors=True)
                raise

    def has(self, name: str) -> bool:
        return name in self._files

    def add(self, name: str, file: WrittenFile) -> None:
        """Records a file that is on disk."""
        self._files[name] = file
        state = {"work": self._fingerprint, "files": {name: asdict(file) for name, file in self._files.items()}}
        write_whole(self.path / _STATE, json.dumps(state))

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a small file."""
        data = content.encode() if isinstance(content, str) else content
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_bytes(data)
        self._files[name] = WrittenFile(len(data), hashlib.sha256(data).hexdigest())

    @property
    def files(self) -> dict[str, WrittenFile]:
        return dict(sorted(self._files.items()))

    def finish(self) -> None:
        """Gives the folder its name. Raises TrainingFailed if there is one of that name by now."""
        if self._final.exists():
            raise TrainingFailed(ErrorCode.INVALID_SPEC, f"{self._final} exists already", "name a new folder")
        for own in (_STATE, _LOCK):
            (self.path / own).unlink(missing_ok=True)
        put_in_place(self.path, self._final)

    def _kept(self) -> dict[str, WrittenFile]:
        """The files of an earlier process that did the same work, as far as they are what it wrote."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
            if state["work"] == self._fingerprint:
                files = {name: WrittenFile(**file) for name, file in state["files"].items()}
                return {name: file for name, file in files.items() if self._is_whole(self.path / name, file)}
        return {}

    @staticmethod
    def _is_whole(path: Path, file: WrittenFile) -> bool:
        return path.is_file() and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256


def _take(lock: int, final: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC, f"another process is writing {final}", "wait for it, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()
