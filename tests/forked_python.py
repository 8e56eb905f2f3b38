"""A Python for programs under test: the trainers that they start by it are forked, as tests/forked_process.py does.

A command or a daemon that starts the real trainer, a conversation or an export would otherwise wait for torch and the
libraries on it to be imported: four seconds of a core each time. The process that it starts is a small one that stands
for the forked one, with another pid: for tests that ask what a program does, not what the kernel sees of its children.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.forked_process import forker
from tests.paths import FORKING_PYTHON, TRAINER_PYTHON

_LONGEST_ORDER = 200_000
_MOST_FILES = 16


@cache
def forked_python(script: str = str(TRAINER_PYTHON)) -> Path:
    """The path of a Python that forks, from a process that has imported `script`; served until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="forked-python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = folder / "socket"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(address))
    listening.listen(64)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{FORKING_PYTHON}" "{address}" "$@"\n')
    python.chmod(0o755)
    threading.Thread(target=_listen, args=(listening, script), daemon=True).start()
    return python


def _listen(listening: socket.socket, script: str) -> None:
    while True:
        connection, _address = listening.accept()
        threading.Thread(target=_serve, args=(connection, script), daemon=True).start()


def _serve(connection: socket.socket, script: str) -> None:
    """Forks one process, and passes signals to it and its end back. Its stand-in's end is its own."""
    with connection:
        message, files, _flags, _address = socket.recv_fds(connection, _LONGEST_ORDER, _MOST_FILES)
        order = json.loads(message)
        try:
            given = dict(zip(order["files"], files, strict=True))
            started = forker(script).start(order["environment"], Path(order["folder"]), given, *order["arguments"])
        finally:
            for file in files:
                os.close(file)
        while (status := started.poll()) is None:
            if not select.select([connection], [], [], 0.03)[0]:
                continue
            number = int(connection.recv(100) or signal.SIGKILL)
            _signal(started.pid, number)
            if number == signal.SIGKILL:
                return
        with suppress(OSError):
            connection.send(str(status).encode())


def _signal(pid: int, number: int) -> None:
    """Sends it to the whole group, which it leads as its stand-in does where a daemon starts it."""
    with suppress(ProcessLookupError):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            os.kill(pid, number)  # before it leads one
