"""The real trainer, with its libraries imported as it imports them: the tests fork their trainers from a process that
has run this, since starting one takes three seconds of a core."""

from __future__ import annotations

import os
import sys

from training.__main__ import _QUIET_AND_OFFLINE, main
from training.kernels import hide_wrong_kernels
from training.process.blocked_imports import hide_unwanted_packages
from training.process.fork_server import _import_libraries


def prepare() -> None:
    os.environ.update(_QUIET_AND_OFFLINE)
    hide_unwanted_packages()
    hide_wrong_kernels()
    _import_libraries()


if __name__ == "__main__":
    sys.exit(main())
else:
    prepare()
