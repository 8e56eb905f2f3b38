"""The output of the trainer's libraries: a file that keeps its last megabytes, and the last lines in memory."""

from __future__ import annotations

from collections import deque
from io import FileIO
from pathlib import Path

import structlog

log = structlog.get_logger()

MAX_BYTES = 16 * 1024 * 1024
TAIL_LINES = 40
# In a file, a progress bar is one endless line.
MAX_LINE_CHARACTERS = 2000


class TrainerLog:
    """Appends to `path`; when that is full, it becomes `<name>.1.log` and a new file begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._file: FileIO | None = None
        self._bytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._bytes = self._file.tell()
        except OSError as error:
            self._give_up(error)

    def write(self, chunk: bytes) -> None:
        lines = chunk.decode(errors="replace").splitlines()
        self._lines.extend(line[-MAX_LINE_CHARACTERS:] for line in lines if line.strip())
        if self._file is None:
            return
        try:
            if self._bytes > MAX_BYTES:
                self._file.close()
                self._path.replace(self._path.with_suffix(".1.log"))
                self._file, self._bytes = self._path.open("wb", buffering=0), 0
            self._bytes += self._file.write(chunk)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _give_up(self, error: OSError) -> None:
        # A full disk, or a successor that removed the folder, must not stop the training: the last lines are kept in
        # memory anyway, and training will report the disk itself.
        self.close()
        self._file = None
        log.warning("trainer_log_lost", error=str(error))

    @property
    def tail(self) -> str:
        """The last lines, oldest first."""
        return "\n".join(self._lines)
