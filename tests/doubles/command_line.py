"""The command `brightrun-trainer`, with everything imported that its commands import when they are called.

The tests fork their commands from a process that has run this: starting one takes half a second of a core.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pkgutil import walk_packages

import typer.main

import daemon.cli
import daemon.job_view
import daemon.terminal
import daemon.trainer.export_process
from daemon.__main__ import app, main

OTHERS = (
    "daemon.base_model.inventory",
    "daemon.base_model.resolve",
    "daemon.doctor.run",
    "daemon.fleet.loop",
    "daemon.gateway.server",
    "daemon.schema.migrations",
    "daemon.service",
    "daemon.storage.open",
    "rich.live",
    "rich.panel",
)


def prepare() -> None:
    """Imports what the commands need, and builds the tree of their words once."""
    for room in (daemon.cli, daemon.job_view, daemon.terminal):
        for module in walk_packages(room.__path__, f"{room.__name__}."):
            import_module(module.name)
    for name in OTHERS:
        import_module(name)
    words = typer.main.get_command(app)
    typer.main.get_command = lambda _app: words


if __name__ == "__main__":
    # What it starts by it is forked as well.
    sys.executable = os.environ.pop("FORKED_PYTHON", sys.executable)
    daemon.trainer.export_process.EXPORT_COMMAND = (sys.executable, "-m", "training.export")
    main()
else:
    prepare()
