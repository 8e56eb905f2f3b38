"""Runs a job on several GPUs from its main process: starts one rank per GPU, passes a stop on, reports the outcome.

The ranks are started and watched by torchrun's own engine, torch.distributed's elastic agent: when one fails it ends
the others. It gets no restarts: the daemon decides whether a job is tried again.

The engine runs in a thread: in the main thread it would handle SIGTERM itself and end the ranks without a checkpoint.
On a GPU host it gives each rank one card, which the rank sees as its only one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TYPE_CHECKING

from training.events import ErrorCode
from training.failures import StopRequested, TrainingFailed
from training.launch.shared_folder import RankFolder
from training.parent_process import adopt_orphans, children_of_this_process, end_every_child
from training.quick_imports import quick_imports
from training.spec import JobSpec
from training.stop_switch import STOP_A_RANK, StopSwitch

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig


class RankStack(Exception):
    """The stack of a rank's failure, as the cause of ours."""


def train_on_ranks(spec: JobSpec, events_fd: int, stop: StopSwitch) -> None:
    """Runs one job in `spec.num_gpus` processes. Raises what `train_adapter` does: TrainingFailed, StopRequested.

    No rank is alive afterwards; if this process is killed, the kernel kills them.
    """
    adopt_orphans()
    desk = RankFolder.lay(spec.work_dir / "ranks", spec)
    _pass_on_sigterm(desk, stop)
    lost = _run(spec, desk, events_fd)
    end_every_child()
    if lost is None and desk.is_finished:
        return
    if lost is None or stop.requested:
        raise StopRequested
    cause = desk.cause()
    # When one rank is killed, the others fail because it stops answering; that is not the cause.
    if cause is None or (cause.code is ErrorCode.INTERNAL and _was_killed(lost)):
        raise _loss_of_a_rank(spec, lost)
    raise TrainingFailed(cause.code, cause.message, cause.hint or "", transient=cause.transient) from RankStack(
        cause.stack
    )


def _run(spec: JobSpec, desk: RankFolder, events_fd: int) -> ProcessFailure | None:
    """Runs the ranks to their end. Returns the one that failed: one that was killed, else the first."""
    with quick_imports():
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch

    if "OMP_NUM_THREADS" not in os.environ and spec.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // spec.num_gpus))
    engine = elastic_launch(launch_config(spec), sys.executable)
    arguments = (
        "-m",
        "training.launch.rank_main",
        "--launcher",
        os.getpid(),
        "--desk",
        desk.folder,
        "--events",
        # The engine starts processes without our descriptors; the kernel lets them open this one by name.
        f"/proc/{os.getpid()}/fd/{events_fd}",
    )
    try:
        with ThreadPoolExecutor(1, "engine") as thread:
            thread.submit(engine, *arguments).result()
    except ChildFailedError as error:
        failures: list[ProcessFailure] = list(error.failures.values())
        return min(failures, key=lambda failure: (not _was_killed(failure), failure.timestamp))
    return None


def _was_killed(failure: ProcessFailure) -> bool:
    """Returns True if killed by a signal other than the one with which the engine ends the others."""
    return failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM


def launch_config(spec: JobSpec) -> LaunchConfig:
    """Returns what `torchrun --standalone` would use, on the loopback interface, with one card for each rank."""
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=spec.num_gpus,
        run_id=f"{spec.job_id}-{spec.lease_epoch}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # Rank n gets the n-th of our CUDA_VISIBLE_DEVICES, and LOCAL_RANK=0.
        virtual_local_rank=spec.device == "cuda",
    )


def _pass_on_sigterm(desk: RankFolder, stop: StopSwitch) -> None:
    def pass_on(_number: int, _frame: FrameType | None) -> None:
        stop.requested = True
        desk.request_stop()
        for child in children_of_this_process():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, STOP_A_RANK)

    signal.signal(signal.SIGTERM, pass_on)


def _loss_of_a_rank(spec: JobSpec, lost: ProcessFailure) -> TrainingFailed:
    how = f"was killed by {lost.signal_name()}" if lost.exitcode < 0 else f"exited with code {lost.exitcode}"
    return TrainingFailed(
        ErrorCode.RANK_LOST,
        f"rank {lost.local_rank} of {spec.num_gpus} {how}, and the other ranks were stopped with it",
        "SIGKILL usually means that the host ran out of memory, and its log says more; "
        "the job is tried again and resumes from its last checkpoint",
        transient=True,
    )
