"""Ties this process to its parent, and its own children to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from training.death_signal import end_with_parent
from training.events import EXIT_STOPPED

_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill us when the parent dies, so that no orphan keeps training.

    `parent` is its pid where known: it may have died before the request took effect.
    """
    parent = os.getppid() if parent is None else parent
    end_with_parent()
    if os.getppid() != parent:
        sys.exit(EXIT_STOPPED)


def adopt_orphans() -> None:
    """Makes the kernel give our children's orphans to us, from now on, instead of to init."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def end_every_child() -> None:
    """Kills and reaps all our descendants, whatever process group or session they created."""
    while True:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid != 0:
            continue
        for child in children_of_this_process():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def children_of_this_process() -> list[int]:
    me, found = os.getpid(), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == me:
            found.append(int(stat.parent.name))
    return found
