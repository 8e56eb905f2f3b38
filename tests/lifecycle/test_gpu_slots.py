"""A host with several cards runs jobs side by side, each child with its own cards and no other."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from uuid import UUID

from psycopg.types.json import Jsonb

from tests.daemon_process import DaemonProcess, eventually
from tests.lifecycle.queue import Queue
from tests.paths import DOUBLES

LONG = [["steps", 4000, 0.05]]


def host_with_four_cards(queue: Queue, folder: Path, **environment: str) -> DaemonProcess:
    # Without trainers that wait for work: each child here has a job.
    daemon = queue.daemon(folder, device="cuda", poll_seconds=60, warm="off")
    double = str(DOUBLES / "nvml")
    daemon.environment["PYTHONPATH"] = f"{double}{os.pathsep}{daemon.environment['PYTHONPATH']}"
    daemon.environment |= environment
    return daemon


def environments_of_children(daemon: DaemonProcess) -> list[dict[str, str]]:
    found = []
    for pid in daemon.children():
        try:
            lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue  # it has just ended
        found.append(dict(line.split("=", 1) for line in lines if "=" in line))
    return found


def cards_of_children(daemon: DaemonProcess) -> list[str]:
    """What each living child of the daemon may see of the cards: the first letters of their UUIDs."""
    seen = [found.get("CUDA_VISIBLE_DEVICES", "") for found in environments_of_children(daemon)]
    return sorted(re.sub(r"(GPU-\w|MIG-\w\w)[\w-]+", r"\1", cards) for cards in seen if cards)


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
        assert cards_of_children(daemon) == ["GPU-0,GPU-1", "GPU-2", "GPU-3"]
        queue.cancel_as_owner(one)
        eventually(lambda: cards_of_children(daemon) == ["GPU-0,GPU-1", "GPU-3"], seconds=30)
        assert queue.row(second_pair)["status"] == "queued"
        queue.cancel_as_owner(last)
        queue.wait_for(second_pair, "running")
        assert cards_of_children(daemon) == ["GPU-0,GPU-1", "GPU-2,GPU-3"]


def test_a_job_that_asks_for_more_cards_than_there_are_waits_and_says_so(queue: Queue, tmp_path: Path) -> None:
    with host_with_four_cards(queue, tmp_path) as daemon:
        daemon.wait_for_log("listener_hears", seconds=30)
        job = queue.insert(gpu_config=Jsonb({"count": 8}))
        queue.wait_for(queue.insert(), "completed")
        (said,) = queue.select("SELECT waiting_reason FROM training_queue WHERE job_id = %s", job)
        assert said["waiting_reason"] == "no worker has 8 GPUs"


def test_a_host_keeps_to_the_cards_and_instances_that_its_operator_shows(queue: Queue, tmp_path: Path) -> None:
    card = {"name": "NVIDIA H100 80GB HBM3", "gib": 79}
    instances = [{"name": "NVIDIA H100 MIG 3g.40gb", "gib": 39}, None, {"name": "NVIDIA H100 MIG 4g.40gb", "gib": 39}]
    cards = json.dumps([card, {**card, "mig": instances}])
    described = {"NVML_DOUBLE": cards, "CUDA_VISIBLE_DEVICES": "MIG-12,MIG-10"}
    tuned = {
        "NCCL_SOCKET_IFNAME": "eth7", "TRITON_PTXAS_PATH": "/opt/ptxas", "FLA_USE_TMA": "1",
        "CUDA_MODULE_LOADING": "LAZY", "TORCHINDUCTOR_CACHE_DIR": "/elsewhere",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
    }  # fmt: skip
    secret = {"TRITON_REGISTRY_TOKEN": "x", "NCCL_API_KEY": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with host_with_four_cards(queue, tmp_path, **described, **tuned, **secret) as daemon:
        daemon.wait_for_log("listener_hears", seconds=30)
        pair = queue.insert(script=LONG, gpu_config=Jsonb({"count": 2}))
        first, second, third = (queue.insert(script=LONG) for _ in range(3))
        queue.wait_for(first, "running")
        queue.wait_for(second, "running")
        assert cards_of_children(daemon) == ["MIG-10", "MIG-12"]
        # Two instances of MIG cannot be joined, and the third card is not shown.
        assert (queue.row(pair)["status"], queue.row(third)["status"]) == ("queued", "queued")
        (worker,) = queue.select("SELECT gpu_count, slots, gpu_memory_gb FROM training_workers")
        assert (worker["gpu_count"], worker["slots"], float(worker["gpu_memory_gb"])) == (1, 2, 39)
        for found in environments_of_children(daemon):
            assert found.items() >= tuned.items() and "PYTORCH_ALLOC_CONF" not in found
            assert found["TRITON_CACHE_DIR"] == str(
                Path(daemon.environment["TRAINER_WORK_DIR"]) / ".kernels" / "triton"
            )
            assert not found.keys() & secret.keys()
