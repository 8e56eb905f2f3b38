"""The messages between the fork server and the daemon, and the file descriptors of a fork."""

from __future__ import annotations

import ctypes
import gc
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from training.base.loaded_model import Base
from training.spec import HoldOrder

_STDIN = 0


class Word(BaseModel):
    """The one thing that a fork may say to the warm process before it ends.

    `hold`: put this base model in the place of the one that is held. `go_on`: do that, and let the next fork go on with
    the job; without a base, only let go of what is held.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["nothing_more", "hold", "go_on"]
    base: Base | None = None


@dataclass(frozen=True)
class Ending:
    """How a fork ended (a wait status), and what it said."""

    status: int
    word: Word | None


def _wait_for_input() -> None:
    """Return when stdin has a line, or an end; read nothing of it."""
    poll = select.poll()
    poll.register(_STDIN, select.POLLIN)
    poll.poll()


def _read_line() -> str:
    """One line, byte by byte: what stands behind it belongs to the next job's process."""
    line = bytearray()
    while (byte := os.read(_STDIN, 1)) and byte != b"\n":
        line += byte
    return line.decode()


def _parse_order(line: str) -> HoldOrder | None:
    try:
        return HoldOrder.model_validate_json(line)
    except ValidationError:
        return None


def _parse_word(told: bytes) -> Word | None:
    try:
        return Word.model_validate_json(told)
    except ValidationError:
        return None


@contextmanager
def _memory_file() -> Iterator[int]:
    """A file without a name, for what a fork leaves behind; unlike a pipe it takes all of it before anybody reads."""
    descriptor = os.memfd_create("left-behind")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _reopened(descriptor: int) -> BinaryIO:
    """A memory file from its beginning."""
    file = os.fdopen(os.dup(descriptor), "rb")
    file.seek(0)
    return file


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _return_memory() -> None:
    gc.unfreeze()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
