"""One rank of a job on several GPUs, started by the engine in training/launch/launcher.py.

    python -m training.launch.rank_main --launcher 4711 --desk <folder> --events /proc/4711/fd/5

Exit status 0 when the job is done or all ranks agreed to stop, 1 after its failure was written to the shared folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from training.event_writer import EventWriter, NullWriter
from training.failures import StopRequested, failed_event
from training.launch.shared_folder import RankFolder
from training.parent_process import die_with_parent
from training.process.blocked_imports import hide_unwanted_packages
from training.quick_imports import quick_imports
from training.spec import JobSpec
from training.stop_switch import STOP_A_RANK, StopSwitch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.launch.rank_main")
    parser.add_argument("--launcher", type=int, required=True, help="pid of the process that started the engine")
    parser.add_argument("--desk", type=Path, required=True, help="folder with the spec")
    parser.add_argument("--events", type=Path, required=True, help="where the first rank writes events")
    chosen = parser.parse_args()
    die_with_parent(chosen.launcher)
    hide_unwanted_packages()
    stop = StopSwitch()
    stop.listen(STOP_A_RANK)
    desk = RankFolder(chosen.desk)
    # The stop request came before we could handle the signal.
    if desk.stop_is_wished:
        return 0
    index = int(os.environ["RANK"])
    spec = desk.spec()
    voice = EventWriter(os.open(chosen.events, os.O_WRONLY), spec.job_id) if index == 0 else NullWriter(spec.job_id)
    try:
        _work(spec, voice, stop)
    except StopRequested:
        return 0
    except Exception as error:  # noqa: BLE001 - the outermost loop of a rank: the launcher says what happened
        desk.leave_failure(index, failed_event(error, spec, spec.job_id), time.monotonic())
        sys.stderr.flush()
        # Skip the interpreter's clean-up: closing a GPU's communicators waits for ranks that wait for us.
        os._exit(1)
    if index == 0:
        desk.note_finished()
    return 0


def _work(spec: JobSpec, voice: EventWriter, stop: StopSwitch) -> None:
    with quick_imports():
        from training.ranks import join, leave
        from training.recipe import train_adapter

    ranks = join(spec.device)
    train_adapter(spec, voice, stop, ranks)
    leave()


if __name__ == "__main__":
    sys.exit(main())
