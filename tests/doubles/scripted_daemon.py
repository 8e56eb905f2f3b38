"""The real daemon with the scripted trainer and the scripted export in place of the real ones, and with shorter
intervals where a test would only wait: for touching its row, probing whether it still receives notifications, claiming
again after refusals, and taking up a delivery that could not be done here. Everything else is as in production."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import daemon.attempt.limits
import daemon.database.listener
import daemon.delivery.runner
import daemon.queue.worker_registry
import daemon.storage.sweep
import daemon.trainer.export_process
import daemon.worker
from daemon.errors import EXIT_UNFIT, HostUnfit
from daemon.service import run_service

if __name__ == "__main__":
    daemon.attempt.limits.READ_SECONDS = 2.0
    daemon.queue.worker_registry.TOUCH_SECONDS = 2.0
    daemon.worker.REFUSED_SECONDS = 5.0
    daemon.database.listener.PROBE_SECONDS = 3.0
    daemon.delivery.runner.FIRST_REST_SECONDS = 0.5
    daemon.delivery.runner.FIRST_BACKOFF_SECONDS = 0.05
    if (seconds := os.environ.get("SWEEP_SECONDS")) is not None:
        daemon.storage.sweep.SWEEP_SECONDS = float(seconds)
    if "REAL_EXPORT" not in os.environ:
        scripted_export = str(Path(__file__).with_name("scripted_export.py"))
        daemon.trainer.export_process.EXPORT_COMMAND = (sys.executable, scripted_export)
    daemon.database.listener.PROBE_LIMIT_SECONDS = 3.0
    try:
        # A test may use its own trainer instead, for example one that cannot be started.
        own = os.environ.get("SCRIPTED_TRAINER")
        run_service((own,) if own else (sys.executable, str(Path(__file__).with_name("scripted_trainer.py"))))
    except HostUnfit as unfit:
        print(unfit, file=sys.stderr)
        sys.exit(EXIT_UNFIT)
