"""A host with several cards runs jobs side by side, each child with its own cards and no other."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

from psycopg.types.json import Jsonb

from tests.daemon_process import DaemonProcess, eventually
from tests.lifecycle.queue import Queue
from tests.paths import DOUBLES

LONG = [["steps", 4000, 0.05]]


def host_with_four_cards(queue: Queue, folder: Path) -> DaemonProcess:
    # Without trainers that wait for work: each child here has a job.
    daemon = queue.daemon(folder, device="cuda", poll_seconds=60, warm="off")
    double = str(DOUBLES / "nvml")
    daemon.environment["PYTHONPATH"] = f"{double}{os.pathsep}{daemon.environment['PYTHONPATH']}"
    return daemon


def cards_of_children(daemon: DaemonProcess) -> list[str]:
    """What each living child of the daemon may see of the cards."""
    seen = []
    for pid in daemon.children():
        try:
            lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue  # it has just ended
        seen += [line.partition("=")[2] for line in lines if line.startswith("CUDA_VISIBLE_DEVICES=")]
    return sorted(seen)


def test_jobs_share_a_host_by_its_cards_and_each_child_sees_its_own(queue: Queue, tmp_path: Path) -> None:
    def insert(gpus: int) -> UUID:
        return queue.insert(script=LONG, gpu_config=Jsonb({"count": gpus}))

    with host_with_four_cards(queue, tmp_path) as daemon:
        daemon.wait_for_log("listener_hears", seconds=30)
        pair = insert(2)
        queue.wait_for(pair, "running")
        one = insert(1)
        queue.wait_for(one, "running")
        second_pair = insert(2)
        last = insert(1)
        # One card is left: the pair at the head of the queue does not hide the single job behind it.
        queue.wait_for(last, "running")
        assert queue.row(second_pair)["status"] == "queued"
        assert cards_of_children(daemon) == ["0,1", "2", "3"]
        queue.cancel_as_owner(one)
        eventually(lambda: cards_of_children(daemon) == ["0,1", "3"], seconds=30)
        assert queue.row(second_pair)["status"] == "queued"
        queue.cancel_as_owner(last)
        queue.wait_for(second_pair, "running")
        assert cards_of_children(daemon) == ["0,1", "2,3"]


def test_a_job_that_asks_for_more_cards_than_there_are_waits_and_says_so(queue: Queue, tmp_path: Path) -> None:
    with host_with_four_cards(queue, tmp_path) as daemon:
        daemon.wait_for_log("listener_hears", seconds=30)
        job = queue.insert(gpu_config=Jsonb({"count": 8}))
        queue.wait_for(queue.insert(), "completed")
        (said,) = queue.select("SELECT waiting_reason FROM training_queue WHERE job_id = %s", job)
        assert said["waiting_reason"] == "no worker has 8 GPUs"
