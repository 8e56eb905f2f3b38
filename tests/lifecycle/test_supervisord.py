"""The daemon under the real supervisord, with the very supervisord.conf of the image."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.daemon_process import SCRIPTED, DaemonProcess, alive, children_of, eventually
from tests.doubles.runpod_api import RunPodDouble
from tests.lifecycle.queue import Queue
from tests.paths import ROOT

SUPERVISORD = Path(sys.executable).with_name("supervisord")
SUPERVISORCTL = Path(sys.executable).with_name("supervisorctl")
pytestmark = pytest.mark.timeout(120)


class Supervisor:
    """A supervisord on the shipped configuration. Its output is a pipe, as a container's is, or a socket."""

    def __init__(
        self,
        queue: Queue,
        folder: Path,
        *,
        command: tuple[str, ...] = (),
        output_is_socket: bool = False,
        **settings: str,
    ) -> None:
        self._command = command or (str(SUPERVISORD), "-n", "-c", str(ROOT / "supervisord.conf"))
        self._output_is_socket = output_is_socket
        # The shipped file says `$TRAINER_PYTHON -m daemon run`: for that, this one runs the scripted daemon.
        python = folder / "python"
        python.write_text(f'#!/bin/sh\n[ "$3" = run ] && exec {" ".join(SCRIPTED)}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.environment = DaemonProcess(queue.dsn, folder).environment | {
            "TRAINER_STORAGE_DIR": str(queue.folder / "storage"),
            "TRAINER_MODELS_DIR": str(queue.folder / "models"),
            "TRAINER_PYTHON": str(python),
            "SUPERVISOR_RUN_DIR": str(folder),
            "SERVE_GATEWAY": "false",
            **settings,
        }
        self.folder = folder
        self._lines: list[str] = []

    def __enter__(self) -> Supervisor:
        ours, theirs = (end.detach() for end in socket.socketpair()) if self._output_is_socket else os.pipe()
        try:
            self.process = subprocess.Popen(
                self._command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        self._output = os.fdopen(ours)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                for pid in children_of(self.process.pid):
                    os.kill(pid, signal.SIGKILL)
                self.process.kill()
                self.process.wait(10)
        self._reader.join(10)

    def _read(self) -> None:
        with self._output as output:
            for line in output:
                self._lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The daemon's own log lines of this name, which reach the container's output."""
        found = []
        for line in list(self._lines):
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if isinstance(parsed, dict) and parsed.get("event") == event:
                found.append(parsed)
        return found

    def ctl(self, *words: str) -> str:
        """What supervisorctl answers; it ends with 3 where a program is not running."""
        command = [str(SUPERVISORCTL), "-c", str(ROOT / "supervisord.conf"), *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def wait_for(self, words: str, count: int = 1, seconds: float = 30.0) -> None:
        eventually(
            lambda: self.output.count(words) >= count, seconds=seconds, why=lambda: f"no {words!r} in\n{self.output}"
        )

    @property
    def daemon_pid(self) -> int:
        """The daemon that started last and lives."""

        def find() -> int | None:
            for pid in children_of(self.process.pid):
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if b"scripted_daemon" in command:
                    return pid
            return None

        return eventually(find, why=lambda: f"no daemon under supervisord:\n{self.output}")


@pytest.fixture
def supervisor(queue: Queue, tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(queue, tmp_path) as running:
        yield running


def test_the_daemon_starts_and_takes_a_job_under_supervisord(queue: Queue, supervisor: Supervisor) -> None:
    job = queue.insert()
    queue.wait_for(job, "completed")
    assert supervisor.logged("job_claimed"), f"the daemon's log is not in the container's output:\n{supervisor.output}"


def test_a_killed_daemon_is_restarted_and_its_job_still_completes(queue: Queue, supervisor: Supervisor) -> None:
    job = queue.insert(script=[["steps", 100, 0.02]])
    queue.wait_for(job, "running")
    first = supervisor.daemon_pid

    os.kill(first, signal.SIGKILL)

    eventually(lambda: supervisor.daemon_pid != first, why=lambda: supervisor.output)
    row = queue.wait_for(job, "completed", seconds=60)
    assert row["lease_epoch"] >= 2, "the job was completed by the successor, under a lease of its own"


def test_term_drains_the_daemon_and_the_job_goes_back_to_the_queue(queue: Queue, supervisor: Supervisor) -> None:
    job = queue.insert(script=[["steps", 10_000, 0.02]])
    queue.wait_for(job, "running")
    family = [supervisor.daemon_pid, *children_of(supervisor.daemon_pid)]
    assert len(family) > 1, "a trainer is at work"

    supervisor.process.send_signal(signal.SIGTERM)
    assert supervisor.process.wait(40) == 0

    row = queue.row(job)
    assert row["status"] == "queued", row
    assert row["attempt"] == 0, "a shutdown costs no attempt"
    assert not [pid for pid in family if alive(pid)]


def test_term_ends_a_trainer_and_its_grandchild_that_both_ignore_it(queue: Queue, tmp_path: Path) -> None:
    """The trainer leads a session of its own, which supervisord's signals to groups do not reach: the daemon must."""
    with Supervisor(queue, tmp_path, TRAINER_DRAIN_SECONDS="1") as supervisor:
        job = queue.insert(script=[["grandchild"], ["ignore_term"], ["steps", 10_000, 0.02]])
        queue.wait_for(job, "running")
        daemon = supervisor.daemon_pid
        (trainer,) = children_of(daemon)
        (grandchild,) = children_of(trainer)

        supervisor.process.send_signal(signal.SIGTERM)
        assert supervisor.process.wait(60) == 0
        eventually(lambda: not any(map(alive, (daemon, trainer, grandchild))), why=lambda: supervisor.output)
    row = queue.row(job)
    assert (row["status"], row["attempt"]) == ("queued", 0), "released, without a checkpoint, at no cost of an attempt"


def test_a_stop_that_is_asked_for_within_the_first_seconds_is_no_failed_start(supervisor: Supervisor) -> None:
    supervisor.wait_for("daemon_started", seconds=60)
    assert "trainer: stopped" in supervisor.ctl("stop", "trainer")
    assert "STOPPED" in supervisor.ctl("status", "trainer")
    supervisor.process.terminate()
    assert supervisor.process.wait(60) == 0
    for words in ("Exited too quickly", "not expected", "BACKOFF", "FATAL", "container_ends"):
        assert words not in supervisor.output, supervisor.output


def test_a_container_that_is_ended_as_soon_as_it_started_ends_in_good_order(supervisor: Supervisor) -> None:
    supervisor.wait_for("daemon_started", seconds=60)
    supervisor.process.terminate()
    assert supervisor.process.wait(60) == 0
    assert supervisor.logged("daemon_ended") and "stopped: trainer (exit status 0)" in supervisor.output
    assert "not expected" not in supervisor.output


@pytest.mark.system
def test_a_drain_within_the_first_seconds_ends_the_pod_and_is_not_undone_by_a_restart(
    queue: Queue, tmp_path: Path
) -> None:
    """Supervisord takes every exit in its first fifteen seconds for a failed start: the daemon's comes later."""
    with RunPodDouble() as runpod:
        runpod.add("me")
        pod = {
            "RUNPOD_POD_ID": "me",
            "RUNPOD_VOLUME_ID": "volume",
            "TRAINER_RUNPOD_API_KEY": "good-key",
            "TRAINER_RUNPOD_API": runpod.url,
        }
        with Supervisor(queue, tmp_path, **pod) as supervisor:
            supervisor.wait_for("listener_hears", seconds=60)
            os.kill(supervisor.daemon_pid, signal.SIGUSR1)
            supervisor.wait_for("exited: trainer (exit status 0; expected)", seconds=60)
            assert supervisor.output.count("spawned: 'trainer'") == 1, supervisor.output
            assert supervisor.logged("pod_ends") and runpod.pods["me"].status == "TERMINATED"


def test_the_gateway_serves_beside_the_daemon_where_it_is_wanted(queue: Queue, tmp_path: Path) -> None:
    wanted = {"TRAINER_GATEWAY_KEYS": "k" * 32, "TRAINER_GATEWAY_HOST": "127.0.0.1", "TRAINER_GATEWAY_PORT": "0"}
    with Supervisor(queue, tmp_path, SERVE_GATEWAY="true", **wanted) as supervisor:
        supervisor.wait_for("gateway_started", seconds=60)
        address = f"http://127.0.0.1:{supervisor.logged('gateway_started')[0]['port']}"
        assert httpx.get(f"{address}/readyz", timeout=30).status_code == 200
        queue.wait_for(queue.insert(), "completed")


@pytest.mark.system  # it lives for as long as supervisord wants a start to last
def test_unusable_settings_are_not_restarted_and_end_the_container(queue: Queue, tmp_path: Path) -> None:
    with Supervisor(queue, tmp_path, TRAINER_LEASE_SECONDS="soon") as supervisor:
        supervisor.process.wait(30)
        assert "TRAINER_LEASE_SECONDS" in supervisor.output, "the fault is named"
        assert supervisor.output.count("spawned: 'trainer'") == 1, supervisor.output
        assert supervisor.logged("container_ends")


@pytest.mark.system
def test_on_a_pod_a_daemon_that_will_not_run_again_stops_the_pod(queue: Queue, tmp_path: Path) -> None:
    with _pods_api() as api:
        pod = {
            "RUNPOD_POD_ID": "pod1",
            "RUNPOD_API_KEY": "key-of-the-pod",
            "TRAINER_RUNPOD_API_KEY": "key-of-ours",
            "TRAINER_RUNPOD_API": api.url,
        }
        with Supervisor(queue, tmp_path, TRAINER_LEASE_SECONDS="soon", **pod) as supervisor:
            supervisor.wait_for("pod_stopped", seconds=60)
            # The pod's own key was refused, ours worked; neither is in the log.
            assert api.calls == [
                ("/pods/pod1/action", "Bearer key-of-the-pod", {"action": "stop"}),
                ("/pods/pod1/action", "Bearer key-of-ours", {"action": "stop"}),
            ]
            assert "key-of" not in supervisor.output.replace("TRAINER_RUNPOD_API_KEY", "")


@pytest.mark.system
def test_a_daemon_that_crashes_at_once_again_and_again_becomes_fatal_and_ends_the_container(
    queue: Queue, tmp_path: Path
) -> None:
    with crashing(queue, tmp_path) as supervisor:
        supervisor.process.wait(90)
        assert supervisor.output.count("spawned: 'trainer'") == 6, "one start and five retries"
        assert "PROCESS_STATE_FATAL" in supervisor.output
        pauses = [later - earlier for earlier, later in pairwise(_seconds_of(supervisor.output, "spawned: 'trainer'"))]
        assert pauses[-1] > pauses[0] + 2, f"with growing pauses: {pauses}"


@pytest.mark.system
def test_on_a_pod_a_daemon_that_crashes_again_and_again_stops_the_pod(queue: Queue, tmp_path: Path) -> None:
    with _pods_api() as api:
        pod = {"RUNPOD_POD_ID": "pod1", "TRAINER_RUNPOD_API_KEY": "key-of-ours", "TRAINER_RUNPOD_API": api.url}
        with crashing(queue, tmp_path, **pod) as supervisor:
            supervisor.wait_for("pod_stopped", seconds=90)
            assert supervisor.output.count("spawned: 'trainer'") == 6 and "PROCESS_STATE_FATAL" in supervisor.output
        assert api.calls == [("/pods/pod1/action", "Bearer key-of-ours", {"action": "stop"})]


@pytest.mark.system
def test_an_output_that_cannot_be_opened_stops_the_pod_instead_of_idling(queue: Queue, tmp_path: Path) -> None:
    """A socket is opened by nobody (ENXIO), as root's pipe is not by another user: no program starts, but the net."""
    with _pods_api() as api:
        pod = {"RUNPOD_POD_ID": "pod1", "TRAINER_RUNPOD_API_KEY": "key-of-ours", "TRAINER_RUNPOD_API": api.url}
        with Supervisor(queue, tmp_path, output_is_socket=True, **pod) as supervisor:
            eventually(lambda: api.calls, seconds=90, why=lambda: supervisor.output)
            assert api.calls == [("/pods/pod1/action", "Bearer key-of-ours", {"action": "stop"})]
            assert "entered FATAL state" in supervisor.output, supervisor.output
            assert "gave up: pod entered" not in supervisor.output
            eventually(lambda: "pod_stopped" in (tmp_path / "pod.log").read_text())
        assert "key-of-ours" not in (tmp_path / "pod.log").read_text() + supervisor.output


def test_the_image_serves_all_the_same_where_its_output_cannot_be_opened(queue: Queue, tmp_path: Path) -> None:
    path = f"{SUPERVISORD.parent}:{os.environ['PATH']}"
    entry = ("bash", str(ROOT / "daemon" / "pod" / "container.sh"))
    with Supervisor(queue, tmp_path, command=entry, output_is_socket=True, PATH=path) as supervisor:
        queue.wait_for(queue.insert(), "completed")
        assert supervisor.logged("job_claimed"), supervisor.output
        supervisor.process.terminate()
        assert supervisor.process.wait(60) == 0


@pytest.mark.system
@pytest.mark.parametrize("on_a_pod", [False, True])
def test_where_no_python_runs_a_shell_ends_what_costs_money(queue: Queue, tmp_path: Path, on_a_pod: bool) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "runpodctl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$1" = pod ]\n')
    (programs / "runpodctl").chmod(0o755)
    pod = {"RUNPOD_POD_ID": "pod1", "PATH": f"{programs}:{os.environ['PATH']}"} if on_a_pod else {}
    supervisor = Supervisor(queue, tmp_path, **pod)
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    with supervisor:
        if on_a_pod:
            asked = tmp_path / "asked"
            eventually(lambda: asked.exists() and "pod stop pod1" in asked.read_text(), seconds=90)
            assert supervisor.process.poll() is None
        else:
            supervisor.process.wait(90)
        assert "gave up: pod entered FATAL" in supervisor.output, supervisor.output


def crashing(queue: Queue, folder: Path, **settings: str) -> Supervisor:
    """A supervisor whose daemon ends at once; everything else is as it is."""
    supervisor = Supervisor(queue, folder, **settings)
    (folder / "python").write_text(f'#!/bin/sh\n[ "$3" = run ] && exit 1\nexec {sys.executable} "$@"\n')
    return supervisor


def _seconds_of(output: str, words: str) -> list[float]:
    """When supervisord said so, by its own timestamps (2026-11-22 08:00:00,123)."""
    stamps = [line[:23] for line in output.splitlines() if words in line]
    return [datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp() for stamp in stamps]


class _PodsApi(ThreadingHTTPServer):
    """RunPod's pod action on loopback: refuses the pod's own key, as a key without the right is refused."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _PodAction)
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> _PodsApi:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.shutdown()
        self._thread.join(10)
        self.server_close()


class _PodAction(BaseHTTPRequestHandler):
    server: _PodsApi

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"]
        self.server.calls.append((self.path, key, body))
        self.send_response(200 if key == "Bearer key-of-ours" else 403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


def _pods_api() -> _PodsApi:
    return _PodsApi()
