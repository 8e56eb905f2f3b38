"""The child process: specs on stdin one after another, events on a pipe, an exit status that tells the ending.

    python -m training --events-fd 5 < specs.jsonl

Exit 0 when every spec became an adapter, 1 after a `failed` event, 75 when asked to stop.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version

from pydantic import ValidationError

from training.events import EXIT_STOPPED, ErrorCode, Failed, Stage, Started
from training.failures import StopRequested, failed_event
from training.spec import JobSpec, faults_of
from training.stop import StopSwitch
from training.voice import Voice

_PR_SET_PDEATHSIG = 1
_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")

# Read by the libraries when they are imported. The daemon downloads; the child never goes out, reports nothing, and
# has no use for forked tokenizer threads.
_QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    # Fewer holes in a card's memory when batches differ in length.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # Threads that spin while they wait slow each other down tenfold when two jobs share a CPU.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training")
    parser.add_argument("--events-fd", type=int, required=True, help="descriptor that events are written to")
    events_fd: int = parser.parse_args().events_fd
    _die_with_parent()
    os.environ.update(_QUIET_AND_OFFLINE)
    stop = StopSwitch()
    stop.listen()
    # readline, not iteration: a warm child must see each spec as it is sent, not when a buffer is full.
    while line := sys.stdin.readline():
        if line.strip():
            status = _run(line, events_fd, stop)
            if status != 0:
                return status
    return 0


def _run(line: str, events_fd: int, stop: StopSwitch) -> int:
    """Turn one line into one adapter, or into one `failed` event."""
    try:
        spec = JobSpec.model_validate_json(line)
    except ValidationError as error:
        faults = "; ".join(f"{fault.field}: {fault.message}" for fault in faults_of(error))
        Voice(events_fd, "").say(
            Failed(
                job_id="",
                code=ErrorCode.INVALID_SPEC,
                message=f"the spec cannot be read: {faults}",
                hint="correct the named fields; daemon and trainer must be of the same version",
            )
        )
        return 1
    voice = Voice(events_fd, spec.job_id)
    voice.say(Started(job_id=spec.job_id, pid=os.getpid(), versions=_versions()))
    voice.stage(Stage.SETUP)
    try:
        # Imported after `started` was said: it takes seconds and brings the heavy libraries.
        from training.recipe import train_adapter

        train_adapter(spec, voice, stop)
    except StopRequested:
        return EXIT_STOPPED
    except Exception as error:  # noqa: BLE001 - the outermost loop: whatever it is, the row must learn of it
        voice.say(failed_event(error, spec, spec.job_id))
        return 1
    return 0


def _die_with_parent() -> None:
    """Ask the kernel to kill us when the daemon dies, so that no orphan trains on for nobody."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The daemon may have died before the request took hold.
    if os.getppid() != parent:
        sys.exit(EXIT_STOPPED)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


if __name__ == "__main__":
    sys.exit(main())
