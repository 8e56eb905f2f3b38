"""What the demo and the playground need: the small model, a temporary Postgres, processes of this service."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon.database.embedded_server import EmbeddedPostgres, EmbeddedPostgresFailed
from daemon.demo.errors import DemoFailed
from daemon.demo.model import MODEL_NAME, convert_model, model_is_ready, models_folder, python_environment
from daemon.demo.own_process import OwnProcess
from daemon.demo.screen import Screen
from daemon.demo.signals import Interruption


def prepare_model(screen: Screen, interruption: Interruption, folder: Path) -> None:
    """Converts the model unless that was done before. Raises DemoFailed, EndedBySignal."""
    if model_is_ready():
        screen.step(f"{MODEL_NAME} is ready ({models_folder()})")
        return
    screen.step(f"converting {MODEL_NAME} from its wheel, once (half a minute) …")
    convert_model(interruption, folder / "convert.log")
    if not model_is_ready():
        raise DemoFailed(f"the converted model in {models_folder()} is damaged: is the disk full?")


@contextmanager
def open_postgres(screen: Screen) -> Iterator[EmbeddedPostgres]:
    try:
        with EmbeddedPostgres() as postgres:
            screen.step(f"Postgres: {postgres.describe()}")
            yield postgres
    except EmbeddedPostgresFailed as failed:
        raise DemoFailed(str(failed)) from failed


def daemon_settings(dsn: str, folder: Path) -> dict[str, str]:
    """Settings for a host that keeps everything in one folder and has only the small model."""
    return {
        "DATABASE_URL": dsn,
        "TRAINER_DEVICE": os.environ.get("TRAINER_DEVICE", "cpu"),
        "TRAINER_DEFAULT_MODEL": MODEL_NAME,
        "TRAINER_MODELS_DIR": str(models_folder()),
        "TRAINER_MODEL_DOWNLOADS": "false",
        "TRAINER_WORK_DIR": str(folder / "jobs"),
        "TRAINER_STORAGE": "folder",
        "TRAINER_STORAGE_DIR": str(folder / "storage"),
        "TRAINER_LOG_FORMAT": "json",
        # The screen draws every step.
        "TRAINER_METRICS_POINTS": "0",
    }


def start(word: str, settings: dict[str, str], folder: Path) -> OwnProcess:
    """`brightrun-trainer WORD` as a process, a context manager; it writes to WORD.log in the folder."""
    # The folder is also the working folder: a .env in the user's own must not apply.
    return OwnProcess(
        [sys.executable, "-m", "daemon", word],
        env=python_environment(folder) | settings,
        cwd=folder,
        log=folder / f"{word}.log",
    )
