"""Reads the output of a job's trainer, which is a file on the host that runs the job."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.commands.jobs import AsJson, JobId

if TYPE_CHECKING:
    from daemon.cli.errors import CommandFailed

_READ_SECONDS = 0.5
_CHUNK_BYTES = 64 * 1024


def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the attempt ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Start this many lines before the end.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Print the output of a job's trainer on the host that runs it; elsewhere, say which host that is."""
    from daemon.terminal.console import print_json
    from daemon.terminal.sanitize import plain_lines

    log = _find_log(job)
    for text in _read(log, lines, follow):
        if as_json:
            print_json({"line": text})
            sys.stdout.flush()
            continue
        sys.stdout.write(plain_lines(text) + "\n")
        sys.stdout.flush()


def _find_log(wanted: str) -> Path:
    """Finds the newest attempt's log in TRAINER_WORK_DIR. Raises CommandFailed, which says where it is or was."""
    from daemon.cli.commands.models import model_settings
    from daemon.cli.data.queries import job_digits

    digits = job_digits(wanted)
    work_dir = model_settings().work_dir
    folders = work_dir.iterdir() if work_dir.is_dir() else ()
    here = [folder for folder in folders if folder.name.replace("-", "").startswith(digits)]
    logs = [log for folder in here for log in folder.glob("attempts/e*/trainer.log")]
    if len({log.parents[2] for log in logs}) > 1:
        from daemon.cli.errors import Misused

        raise Misused(f"{wanted} begins several jobs' ids", "give more characters")
    if not logs:
        raise _elsewhere(wanted, work_dir)
    return max(logs, key=lambda log: log.stat().st_mtime)


def _elsewhere(wanted: str, work_dir: Path) -> CommandFailed:
    """Explains from the job's row why there is no log here."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import find_job, list_workers, read_details, read_job
    from daemon.cli.errors import CommandFailed

    with open_database() as connection:
        job_id = find_job(connection, wanted)
        row = read_job(connection, job_id)
        details = read_details(connection, job_id)
        hosts = {worker.worker_id: worker for worker in list_workers(connection, everyone=True)}
    if row.state == "queued":
        return CommandFailed(f"job {job_id} is queued: it has no log yet", f"it waits: {row.waiting_reason}")
    if details.worker_id is not None and details.worker_id in hosts:
        host = hosts[details.worker_id]
        place = f"{work_dir}/{job_id}/attempts/e{details.lease_epoch}-*/trainer.log"
        pod = f" (pod {host.pod})" if host.pod else ""
        return CommandFailed(
            f"job {job_id} runs on host {host.host}{pod}, not here (looked under {work_dir})",
            f"on that host run `brightrun-trainer logs {job_id}`, or read under its TRAINER_WORK_DIR the file {place}",
        )
    if row.state == "completed":
        return CommandFailed(
            f"job {job_id} is completed and its work folder is gone",
            "the log of its steps is training_log.jsonl in the adapter: run `brightrun-trainer download`, or `events`",
        )
    stack = (
        "its last lines are in the row: brightrun-trainer show"
        if details.error_stack
        else "its events are in the row: brightrun-trainer events"
    )
    return CommandFailed(f"job {job_id} is {row.state} and its attempt's folder is gone", f"{stack} {job_id}")


def _read(log: Path, lines: int, follow: bool) -> Iterator[str]:
    """Yields the last lines and, with `follow`, new ones until the file is removed with its attempt."""
    with log.open("rb") as file:
        start = _start_of_last(log, lines)
        file.seek(start)
        rest = b""
        while True:
            chunk = file.read(_CHUNK_BYTES)
            if chunk:
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
                continue
            # Rotated: the name now belongs to another file, and this one has been read to its end.
            gone = not log.exists() or log.stat().st_ino != _inode(file.fileno())
            if not follow or gone:
                break
            time.sleep(_READ_SECONDS)
    if rest:
        yield rest.decode(errors="replace")
    if follow and log.exists():
        yield from _read(log, sys.maxsize, follow)


def _start_of_last(log: Path, lines: int) -> int:
    """Finds where the last `lines` lines begin. The file keeps only the last megabytes, so this reads it whole."""
    content = log.read_bytes()
    position = len(content)
    for _ in range(lines + 1):
        position = content.rfind(b"\n", 0, max(position, 0))
        if position < 0:
            return 0
    return position + 1


def _inode(descriptor: int) -> int:
    import os

    return os.fstat(descriptor).st_ino
