"""A row that asks for two GPUs, on a CPU host with two places: two real ranks under a real daemon, to every ending."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from tests.daemon_process import REAL, DaemonProcess, alive, children_of, eventually
from tests.lifecycle.queue import Queue
from tests.tiny_models import conversation, make_model

SECONDS = 400

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]


def _insert(queue: Queue, *, conversations: int, **hyperparameters: Any) -> UUID:
    return queue.insert(
        lines=[json.dumps(conversation(number)) for number in range(conversations)],
        hyperparameters={"base_model": "acme/tiny", "lora_rank": 4, "num_epochs": 1, **hyperparameters},
        gpu_config=Jsonb({"num_gpus": 2}),
    )


def _ranks(daemon: DaemonProcess) -> list[int]:
    """Both ranks, once they are there: the children of the daemon's child that has any."""

    def both() -> list[int] | None:
        found = [pid for child in daemon.children() for pid in children_of(child)]
        return found if len(found) == 2 else None

    return eventually(both, seconds=SECONDS, why=lambda: f"no two ranks\n{daemon.tail()}")


def _gone(pids: list[int]) -> bool:
    return not any(alive(pid) for pid in pids)


def test_a_job_on_two_places_ends_as_one_on_one_would(queue: Queue, tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "acme" / "tiny", "qwen3")
    with queue.daemon(tmp_path, command=REAL, slots=2, warm="off", checkpoint_seconds=1, drain_seconds=120) as daemon:
        done = _insert(queue, conversations=24)
        ranks = _ranks(daemon)
        row = queue.wait_for(done, "completed", seconds=SECONDS)
        assert row["adapter_path"] and row["progress"] == 100
        assert [point["step"] for point in queue.points(done)] == list(range(1, 7))
        eventually(lambda: _gone(ranks), why=lambda: "a rank outlived its job")

        cancelled = _insert(queue, conversations=200, num_epochs=50)
        ranks = _ranks(daemon)
        queue.wait_for(cancelled, "running", seconds=SECONDS)
        queue.cancel_as_owner(cancelled)
        eventually(lambda: _gone(ranks), seconds=60, why=lambda: "a rank outlived its cancelled job")

        drained = _insert(queue, conversations=200, num_epochs=50)
        ranks = _ranks(daemon)
        queue.wait_for(drained, "running", seconds=SECONDS)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(SECONDS) == 0
        assert _gone(ranks)
    row = queue.row(drained)
    assert row["status"] == "queued" and row["attempt"] == 0
    assert list((tmp_path / "jobs").glob(f"{drained}/checkpoints/*/checkpoint-*"))


def test_no_rank_outlives_a_daemon_that_was_killed(queue: Queue, tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "acme" / "tiny", "qwen3")
    with queue.daemon(tmp_path, command=REAL, slots=2, warm="off") as daemon:
        job = _insert(queue, conversations=200, num_epochs=50)
        ranks = _ranks(daemon)
        queue.wait_for(job, "running", seconds=SECONDS)
        os.kill(daemon.pid, signal.SIGKILL)
        eventually(lambda: _gone(ranks), seconds=60, why=lambda: "a rank outlived the daemon")


def test_a_rank_that_hangs_ends_the_attempt_of_all(queue: Queue, tmp_path: Path) -> None:
    """The others wait for it inside of an exchange; nobody says a word, and the daemon's patience ends."""
    make_model(tmp_path / "models" / "acme" / "tiny", "qwen3")
    with queue.daemon(tmp_path, command=REAL, slots=2, warm="off", stall_seconds=120) as daemon:
        job = _insert(queue, conversations=200, num_epochs=50)
        ranks = _ranks(daemon)
        queue.wait_for(job, "running", seconds=SECONDS)
        os.kill(ranks[1], signal.SIGSTOP)
        daemon.wait_for_log("trainer_stalled", seconds=SECONDS)
        eventually(lambda: _gone(ranks), seconds=60, why=lambda: "a rank outlived its attempt")
