"""Runs the whole service on this machine until Ctrl-C: Postgres, a host, the dashboard, and a user who owns the jobs.

A terminal that sources the environment file can use it. Everything is removed at the end.
"""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
from psycopg.rows import dict_row
from rich.console import Console

from daemon.demo.app_rows import insert_user
from daemon.demo.errors import DemoFailed
from daemon.demo.json_screen import JsonScreen
from daemon.demo.local_service import daemon_settings, open_postgres, prepare_model, start
from daemon.demo.model import cache_folder, find_gguf
from daemon.demo.own_process import OwnProcess
from daemon.demo.run import VOICE
from daemon.demo.screen import Screen
from daemon.demo.signals import EndedBySignal, Interruption
from daemon.schema.migrations import migrate

_ADDRESS = "127.0.0.1"
_PORT = 8000
_READY_SECONDS = 60.0
_LOOK_SECONDS = 0.5


def environment_file() -> Path:
    return cache_folder() / "playground.env"


def run_playground(*, as_json: bool = False) -> int:
    """Serves until a signal. Exit status 0 after a signal, 1 if a process could not start, or ended by itself."""
    screen = JsonScreen() if as_json else Screen(Console())
    with Interruption() as interruption:
        try:
            _serve(screen, interruption)
        except EndedBySignal:
            screen.say("\nStopped. The host, the dashboard and Postgres have ended, and their data is gone.")
        except DemoFailed as failed:
            screen.failure(failed)
            return 1
    return 0


def _serve(screen: Screen, interruption: Interruption) -> None:
    find_gguf()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brightrun-playground-")))
        prepare_model(screen, interruption, folder)
        dsn = stack.enter_context(open_postgres(screen)).dsn()
        screen.step(f"migrations: {len(migrate(dsn, local=True))} applied")
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
            user_id = insert_user(connection)
        settings = daemon_settings(dsn, folder) | {"TRAINER_SERVICE_USER_ID": str(user_id)}
        key, port = secrets.token_hex(16), _free_port()
        gateway = {
            "TRAINER_GATEWAY_KEYS": key,
            "TRAINER_GATEWAY_HOST": _ADDRESS,
            "TRAINER_GATEWAY_PORT": str(port),
        }
        processes = {
            "the host": stack.enter_context(start("run", settings, folder)),
            "the dashboard": stack.enter_context(start("serve", settings | gateway, folder)),
        }
        _wait_until_served(port, processes, interruption)
        source = stack.enter_context(_environment(settings))
        _welcome(screen, f"http://{_ADDRESS}:{port}/dashboard", key, source)
        while True:
            _check(processes)
            interruption.sleep(_LOOK_SECONDS)


def _welcome(screen: Screen, address: str, key: str, source: Path) -> None:
    voice = os.path.relpath(VOICE)
    screen.step("a host waits for rows")
    screen.result(f"dashboard: {address}")
    screen.result(f"its key:   {key}")
    screen.say(
        "\nIn another terminal:\n\n"
        f"  . {source}\n"
        f"  brightrun-trainer submit {voice} --epochs 1 --lr 0.002 --watch\n"
        f"  brightrun-trainer submit {voice} --model nobody/has-this    # fails, and says why\n\n"
        "Ctrl-C here ends all of it and keeps nothing."
    )


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[Path]:
    """Writes the settings to a file for `.`, readable only by its owner, and removes it when they no longer apply."""
    file = environment_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    path = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    file.write_text("\n".join([*lines, f"export PATH={path}", ""]), encoding="utf-8")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _wait_until_served(port: int, processes: dict[str, OwnProcess], interruption: Interruption) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        _check(processes)
        try:
            socket.create_connection((_ADDRESS, port), timeout=1).close()
        except OSError:
            interruption.sleep(0.1)
        else:
            return
    raise DemoFailed(f"the dashboard did not answer within {_READY_SECONDS:.0f} s", _tails(processes))


def _check(processes: dict[str, OwnProcess]) -> None:
    for name, process in processes.items():
        if process.exit_status is not None:
            raise DemoFailed(f"{name} ended with exit status {process.exit_status}", process.log_tail())


def _tails(processes: dict[str, OwnProcess]) -> str:
    return "\n".join(process.log_tail() for process in processes.values())


def _free_port() -> int:
    """The gateway's usual port, else any free one."""
    for wanted in (_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind((_ADDRESS, wanted))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoFailed("no port of this machine is free")
