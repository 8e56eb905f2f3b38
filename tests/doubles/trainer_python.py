"""Python that has the trainer's libraries imported already, as a waiting trainer has: `-m MODULE …`, or `SCRIPT …`.

The tests fork from it what needs these libraries: importing them takes three seconds of a core.
"""

from __future__ import annotations

import os
import runpy
import sys
import time

from training.__main__ import _QUIET_AND_OFFLINE
from training.process.blocked_imports import hide_unwanted_packages
from training.process.fork_server import _import_libraries


def prepare() -> None:
    os.environ.update(_QUIET_AND_OFFLINE)
    hide_unwanted_packages()
    _import_libraries()


def leave_slowly(seconds: float) -> None:
    """Lets every fork of this process pause before it ends."""
    leave = os._exit

    def leave_later(status: int) -> None:
        time.sleep(seconds)
        leave(status)

    os._exit = leave_later  # type: ignore[assignment]


if __name__ == "__main__":
    if seconds := os.environ.get("LEAVES_AFTER_SECONDS"):
        leave_slowly(float(seconds))
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
else:
    prepare()
