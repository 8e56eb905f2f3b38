"""Turns one line of stdin into one adapter or one `failed` event; the exit status tells which."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from pydantic import ValidationError

from training.event_writer import EventWriter
from training.events import EXIT_STOPPED, ErrorCode, RunFailed, Stage, Started
from training.failures import StopRequested, failed_event
from training.spec import JobSpec, faults_of

_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def read_spec(line: str, events_fd: int) -> JobSpec | None:
    """Returns the spec, or None after reporting to the daemon what is wrong with it."""
    try:
        return JobSpec.model_validate_json(line)
    except ValidationError as error:
        faults = "; ".join(f"{fault.field}: {fault.message}" for fault in faults_of(error))
        EventWriter(events_fd, "").say(
            RunFailed(
                job_id="",
                code=ErrorCode.INVALID_SPEC,
                message=f"the spec cannot be read: {faults}",
                hint="correct the named fields; daemon and trainer must be of the same version",
            )
        )
        return None


def begin_job(spec: JobSpec, voice: EventWriter) -> None:
    """Reports that the job has started. From here on its scratch files are in its own folder and go with it."""
    voice.say(Started(job_id=spec.job_id, pid=os.getpid(), versions=_versions()))
    voice.stage(Stage.SETUP)
    scratch = spec.work_dir / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)


def status_of(work: Callable[[], None], spec: JobSpec, voice: EventWriter) -> int:
    """Runs `work` and returns an exit status: 0, 1 after reporting `failed`, 75 when stopped."""
    try:
        work()
    except StopRequested:
        return EXIT_STOPPED
    except Exception as error:  # noqa: BLE001 - the outermost loop: whatever it is, the row must learn of it
        voice.say(failed_event(error, spec, spec.job_id))
        return 1
    return 0


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
