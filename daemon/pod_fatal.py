"""Supervisord's event listener: when the daemon will not run again, end what costs money, and say so loudly.

    python -m daemon.pod_fatal        (started by supervisord, which speaks to it on stdin and stdout)

On a RunPod pod it stops the pod; elsewhere it ends supervisord, so that the container ends and its
orchestrator knows. It reads the environment itself: unusable settings are one reason why it is needed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

import structlog

from daemon.logs import configure_logs

log = structlog.get_logger()

PROGRAM = "trainer"
API = "https://api.runpod.io/v2"
# A pod that cannot be stopped burns money: try for ever, but slowly enough to read the log.
RETRY_SECONDS = 60.0
_CALL_SECONDS = 20.0


@dataclass(frozen=True)
class Notification:
    """One word from supervisord: `PROCESS_STATE_FATAL` or `PROCESS_STATE_EXITED`, and of which program."""

    event: str
    program: str
    expected: bool

    @property
    def is_the_end(self) -> bool:
        """FATAL: supervisord gave up. EXITED as expected (0 drained, 78 unusable settings): it will not restart."""
        return self.program == PROGRAM and (self.event == "PROCESS_STATE_FATAL" or self.expected)


def listen(stdin: TextIO, stdout: TextIO) -> Iterator[Notification]:
    """Speak supervisord's listener protocol: READY, a header line, a payload of so many bytes, RESULT."""
    while True:
        stdout.write("READY\n")
        stdout.flush()
        header = stdin.readline()
        if not header:
            return
        fields = _fields(header)
        payload = _fields(stdin.read(int(fields["len"])))
        yield Notification(fields["eventname"], payload.get("processname", ""), payload.get("expected") == "1")
        stdout.write("RESULT 2\nOK")
        stdout.flush()


def stop_pod(pod_id: str, environment: Mapping[str, str]) -> bool:
    """Stop this pod by the first way that works: the pod's key, our own key, runpodctl. Each failure is logged."""
    for name in ("RUNPOD_API_KEY", "TRAINER_RUNPOD_API_KEY"):
        key = environment.get(name)
        if key and _stopped_by_api(environment.get("TRAINER_RUNPOD_API", API), pod_id, key, name):
            return True
    return _stopped_by_command(pod_id)


def _stopped_by_api(api: str, pod_id: str, key: str, key_name: str) -> bool:
    import httpx

    try:
        answer = httpx.post(
            f"{api}/pods/{pod_id}/action",
            json={"action": "stop"},
            headers={"Authorization": f"Bearer {key}"},
            timeout=_CALL_SECONDS,
        )
    except httpx.HTTPError as error:
        log.error("pod_stop_failed", way=key_name, error=type(error).__name__)
        return False
    # 409: the pod is already stopping.
    if answer.is_success or answer.status_code == httpx.codes.CONFLICT:
        log.warning("pod_stopped", way=key_name, pod_id=pod_id, status=answer.status_code)
        return True
    log.error("pod_stop_failed", way=key_name, status=answer.status_code, body=answer.text[:300])
    return False


def _stopped_by_command(pod_id: str) -> bool:
    command = shutil.which("runpodctl")
    if command is None:
        log.error("pod_stop_failed", way="runpodctl", error="not installed")
        return False
    try:
        done = subprocess.run(
            [command, "stop", "pod", pod_id], capture_output=True, text=True, timeout=_CALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        log.error("pod_stop_failed", way="runpodctl", error="timeout")
        return False
    if done.returncode != 0:
        log.error("pod_stop_failed", way="runpodctl", status=done.returncode, error=done.stderr[-300:])
        return False
    log.warning("pod_stopped", way="runpodctl", pod_id=pod_id)
    return True


def end_host(environment: Mapping[str, str], supervisor_pid: int) -> None:
    """Stop the pod, for as long as it takes; without a pod end supervisord, and with it the container."""
    pod_id = environment.get("RUNPOD_POD_ID")
    if pod_id is None:
        log.error("container_ends", advice="not on RunPod: supervisord is ended, see the daemon's last lines above")
        os.kill(supervisor_pid, signal.SIGTERM)
        return
    while not stop_pod(pod_id, environment):
        log.critical(
            "pod_idle_and_billing",
            pod_id=pod_id,
            advice="no way to stop this pod worked: stop it by hand, and set TRAINER_RUNPOD_API_KEY",
        )
        time.sleep(RETRY_SECONDS)


def main() -> int:
    secrets = (os.environ.get("RUNPOD_API_KEY", ""), os.environ.get("TRAINER_RUNPOD_API_KEY", ""))
    configure_logs("info", "json", secrets)
    supervisor_pid = os.getppid()
    for notification in listen(sys.stdin, sys.stdout):
        if notification.is_the_end:
            log.critical("daemon_will_not_run_again", supervisor_event=notification.event)
            end_host(os.environ, supervisor_pid)
    return 0


def _fields(line: str) -> dict[str, str]:
    return dict(part.split(":", 1) for part in line.split() if ":" in part)


if __name__ == "__main__":
    sys.exit(main())
