"""The trainer process: reads specs from stdin, writes events to a pipe, and reports the outcome as its exit status.

    python -m training --events-fd 5 < spec.json                        one job, in this process
    python -m training --events-fd 5 --warm --keep-bytes 8000000000     jobs one after another, each in a fork

Exit 0 when every spec became an adapter, 1 after a `failed` event, 75 when asked to stop.
"""

from __future__ import annotations

import argparse
import os
import sys

from training.event_writer import EventWriter
from training.files.page_cache import read_ahead
from training.parent_process import die_with_parent
from training.process.blocked_imports import hide_unwanted_packages
from training.process.run_job import begin_job, read_spec, status_of
from training.quick_imports import quick_imports
from training.stop_switch import StopSwitch

# The libraries read these when they are imported. The daemon does all downloading; this process stays offline,
# sends no telemetry, and never forks tokenizer threads.
_QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    # Ask NVML, not the driver, whether there is a GPU: once the driver was opened, a fork cannot use it.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Threads that spin while they wait make two jobs on one CPU ten times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training")
    parser.add_argument("--events-fd", type=int, required=True, help="descriptor that events are written to")
    parser.add_argument("--warm", action="store_true", help="stay after a job and take the next one")
    parser.add_argument("--keep-bytes", type=int, default=0, help="a base model up to this size stays in memory")
    chosen = parser.parse_args()
    die_with_parent()
    os.environ.update(_QUIET_AND_OFFLINE)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Less fragmentation of GPU memory when batches differ in length.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    hide_unwanted_packages()
    if chosen.warm:
        from training.process.fork_server import ForkServer

        return ForkServer(chosen.events_fd, chosen.keep_bytes).serve()
    return run_alone(chosen.events_fd)


def run_alone(events_fd: int) -> int:
    """Runs one job in this process, which then ends."""
    stop = StopSwitch()
    stop.listen()
    line = sys.stdin.readline()
    if not line.strip():
        return 0
    spec = read_spec(line, events_fd)
    if spec is None:
        return 1
    voice = EventWriter(events_fd, spec.job_id)
    begin_job(spec, voice)
    read_ahead(spec)

    def work() -> None:
        # Imported after the `started` event: it takes seconds and loads the heavy libraries.
        if spec.num_gpus > 1:
            from training.launch.launcher import train_on_ranks

            train_on_ranks(spec, events_fd, stop)
        else:
            with quick_imports():
                from training.recipe import train_adapter

            train_adapter(spec, voice, stop)

    return status_of(work, spec, voice)


if __name__ == "__main__":
    sys.exit(main())
