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


class ForkMessage(BaseModel):
    """The one message that a fork may send to the fork server before it ends.

    `hold`: load this base model in place of the one that is held. `go_on`: do that, and let the next fork continue the
    job. Without a base, only release the one that is held.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["nothing_more", "hold", "go_on"]
    base: Base | None = None


@dataclass(frozen=True)
class ForkResult:
    """How a fork ended (a wait status), and the message it sent."""

    status: int
    message: ForkMessage | None


def _wait_for_input() -> None:
    """Returns when stdin has a line or has ended; reads none of it."""
    poll = select.poll()
    poll.register(_STDIN, select.POLLIN)
    poll.poll()


def _read_line() -> str:
    """Reads one line byte by byte: what follows belongs to the next job's process."""
    line = bytearray()
    while (byte := os.read(_STDIN, 1)) and byte != b"\n":
        line += byte
    return line.decode()


def _parse_order(line: str) -> HoldOrder | None:
    try:
        return HoldOrder.model_validate_json(line)
    except ValidationError:
        return None


def _parse_message(told: bytes) -> ForkMessage | None:
    try:
        return ForkMessage.model_validate_json(told)
    except ValidationError:
        return None


@contextmanager
def _memory_file() -> Iterator[int]:
    """An anonymous file for what a fork leaves behind. Unlike a pipe, it takes everything before anyone reads."""
    descriptor = os.memfd_create("left-behind")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _reopened(descriptor: int) -> BinaryIO:
    """Opens a memory file at its beginning."""
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
