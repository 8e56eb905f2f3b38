"""Listens to supervisord's events: when the daemon will not run again, it ends what costs money and logs that.

    python -m daemon.pod.supervisor_listener        (supervisord starts it and uses its stdin and stdout)

On a RunPod pod it stops the pod (daemon.pod.shutdown); elsewhere it ends supervisord, so that the container ends and
its orchestrator notices. It reads the environment itself, because unusable settings may be why the daemon ended.
`supervisor` is installed where supervisord runs: in the image, and with the dev extra.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import structlog
from supervisor import childutils

from daemon.logs import configure_logs

log = structlog.get_logger()

PROGRAM = "trainer"
# A pod that cannot be stopped costs money: try for ever, but slowly enough for a readable log.
RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class Notification:
    """One event from supervisord, `PROCESS_STATE_FATAL` or `PROCESS_STATE_EXITED`, and its program."""

    event: str
    program: str
    expected: bool

    @property
    def is_the_end(self) -> bool:
        """Whether the daemon stays down. FATAL: supervisord gave up. EXITED as expected (0 drained, 78 unusable
        settings): it will not be restarted."""
        return self.program == PROGRAM and (self.event == "PROCESS_STATE_FATAL" or self.expected)


def listen(stdin: TextIO, stdout: TextIO) -> Iterator[Notification]:
    """Speaks supervisord's listener protocol until supervisord ends. Acknowledges each event after it was handled."""
    while True:
        try:
            header, payload = childutils.listener.wait(stdin, stdout)
        except KeyError:
            # Supervisord closed its end of the pipe: a header without a length.
            return
        fields = childutils.get_headers(payload)
        yield Notification(header["eventname"], fields.get("processname", ""), fields.get("expected") == "1")
        childutils.listener.ok(stdout)


def end_host(environment: Mapping[str, str], supervisor_pid: int) -> None:
    """Stops the pod, however long that takes. Without a pod, ends supervisord, and with it the container."""
    pod_id = environment.get("RUNPOD_POD_ID")
    if pod_id is None:
        log.error("container_ends", advice="not on RunPod: supervisord is ended, see the daemon's last lines above")
        os.kill(supervisor_pid, signal.SIGTERM)
        return
    # Imported only when needed: it loads an HTTP client, and this process may wait for years.
    from daemon.pod.shutdown import end_own_pod

    # Stop, never terminate: the log must remain for finding out why it failed.
    while not asyncio.run(end_own_pod(pod_id, "stop", environment)):
        time.sleep(RETRY_SECONDS)


def main() -> int:
    secrets = (os.environ.get("RUNPOD_API_KEY", ""), os.environ.get("TRAINER_RUNPOD_API_KEY", ""))
    supervisor_pid = os.getppid()
    _write_to_the_container(supervisor_pid)
    configure_logs("info", "json", secrets)
    for notification in listen(sys.stdin, sys.stdout):
        if notification.is_the_end:
            # After an expected exit the daemon's own last log lines say why.
            say = log.warning if notification.expected else log.critical
            say("daemon_will_not_run_again", supervisor_event=notification.event)
            end_host(os.environ, supervisor_pid)
    return 0


def _write_to_the_container(supervisor_pid: int) -> None:
    """Sends our log to supervisord's output; if that cannot be opened, to a file beside its socket.

    Supervisord does not open our log, because it would not start us if it could not open it."""
    places = (Path(f"/proc/{supervisor_pid}/fd/2"), Path(os.environ.get("SUPERVISOR_RUN_DIR", "/tmp")) / "pod.log")  # noqa: S108
    for place in places:
        try:
            # Append: if the container's log is a file, writing from its start would overwrite it.
            opened = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY, 0o600)
        except OSError:
            continue
        os.dup2(opened, sys.stderr.fileno())
        os.close(opened)
        return


if __name__ == "__main__":
    sys.exit(main())
