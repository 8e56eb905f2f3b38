"""The real daemon with the real trainer, both forked: from processes that have imported what they import."""

from __future__ import annotations

import os
import sys

import daemon.trainer.export_process
from daemon.errors import EXIT_UNFIT, HostUnfit
from daemon.service import run_service

if __name__ == "__main__":
    sys.executable = os.environ.pop("FORKED_PYTHON")
    daemon.trainer.export_process.EXPORT_COMMAND = (sys.executable, "-m", "training.export")
    try:
        run_service((sys.executable, "-m", "training"))
    except HostUnfit as unfit:
        print(unfit, file=sys.stderr)
        sys.exit(EXIT_UNFIT)
