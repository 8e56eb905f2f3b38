"""The real daemon with the scripted trainer in place of the real one; everything else is as in production."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from daemon.errors import EXIT_UNFIT, HostUnfit
from daemon.service import run_service

if __name__ == "__main__":
    try:
        # A test may put a trainer of its own in its place: one that cannot be started, say.
        own = os.environ.get("SCRIPTED_TRAINER")
        run_service((own,) if own else (sys.executable, str(Path(__file__).with_name("scripted_trainer.py"))))
    except HostUnfit as unfit:
        print(unfit, file=sys.stderr)
        sys.exit(EXIT_UNFIT)
