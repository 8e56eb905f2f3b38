"""SIGKILL for whoever takes part in a job, at each of its moments: every job still ends once, and nobody is left.

Real trainers and a small real model. Which moment meets which victim is seeded (CHAOS_SEED); the chaos run's judge has
the last word.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from tests.daemon_process import REAL, DaemonProcess, alive, children_of, eventually
from tests.lifecycle.project import Project
from tests.lifecycle.queue import FINAL, Queue
from tests.lifecycle.test_chaos import as_host, run_oracle, seed_of_the_run
from tests.tiny_models import conversation, make_model

SECONDS = 300.0
# Long enough for a busy machine, short enough to be reaped while the test looks on.
LEASE_SECONDS = 5

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]


class Stream:
    """A queue that never dries up, one daemon at a time, and what there is to kill."""

    def __init__(self, queue: Queue, start: Callable[[str], DaemonProcess], insert: Callable[[], UUID]) -> None:
        self.queue = queue
        self._start = start
        self._insert = insert
        self._boots = 0
        self.daemon = self._boot()
        self.kills: list[str] = []

    def _boot(self) -> DaemonProcess:
        self._boots += 1
        name = f"host-{self._boots}"
        daemon = self._start(name)
        daemon.environment |= {
            "DATABASE_URL": as_host(self.queue.dsn.partition("?")[0], name),
            "TRAINER_LEASE_SECONDS": str(LEASE_SECONDS),
        }
        return daemon.start()

    def work(self) -> bool:
        """See that there is always work, due now; never True."""
        self.queue.select("UPDATE training_jobs SET run_after = NULL WHERE status = 'queued' AND run_after IS NOT NULL")
        if len(self.unfinished()) < 2:
            self._insert()
        return False

    def unfinished(self) -> list[dict[str, Any]]:
        return [row for row in self.queue.select("SELECT * FROM training_jobs") if row["status"] not in FINAL]

    def stage(self) -> str | None:
        """Of the job at hand; `training` once it has made a step."""
        return next((row["current_stage"] for row in self.unfinished() if row["status"] != "queued"), None)

    def trainers(self) -> list[int]:
        return [pid for pid in self.daemon.children() if not _commanded(pid, b"training.data.validate")]

    def below_trainers(self) -> list[int]:
        """Forks of a warm trainer, or ranks."""
        return [pid for trainer in self.trainers() for pid in children_of(trainer)]

    def await_moment(self, is_now: Callable[[], object]) -> None:
        eventually(lambda: self.work() or is_now(), seconds=SECONDS, why=self.tell)

    def kill(self, moment: str, victim: str, pids: Sequence[int]) -> None:
        met = pids or victim == "daemon"
        self.kills.append(f"{moment}: {victim}" + ("" if met else " (gone)"))
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if victim == "daemon":
            below = [*self.daemon.children(), *self.below_trainers()]
            self.daemon.kill()
            eventually(lambda: gone(below), seconds=SECONDS, why=lambda: f"outlived their daemon: {below}")
            self.daemon = self._boot()

    def calm(self) -> None:
        """No more kills: what is left is done, and the daemon leaves in good order."""

        def ended() -> bool:
            self.queue.select("UPDATE training_jobs SET run_after = NULL WHERE status = 'queued'")
            return not self.unfinished() and not self.queue.leases()

        eventually(ended, seconds=SECONDS, why=self.tell)
        self.daemon.wait_for_log("daemon_started", seconds=60)
        self.daemon.signal(signal.SIGTERM)
        assert self.daemon.wait(60) == 0, self.tell()

    def tell(self) -> str:
        rows = [
            (row["status"], row["current_stage"], row["attempt"], row["error_message"]) for row in self.unfinished()
        ]
        return f"killed {self.kills}, left {rows}\n{self.daemon.tail()}"

    def assert_all_completed(self) -> None:
        for row in self.queue.select("SELECT * FROM training_jobs"):
            assert row["status"] == "completed", (row["error_code"], row["error_message"], self.kills)
            assert self.queue.story(row["id"]).count("completed") == 1


def gone(pids: Iterable[int]) -> bool:
    return not any(alive(pid) for pid in pids)


def _commanded(pid: int, word: bytes) -> bool:
    try:
        return word in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def conversations(count: int) -> list[str]:
    return [json.dumps(conversation(number)) for number in range(count)]


@pytest.mark.double
@pytest.mark.parametrize("victim", ["trainer", "fork", "daemon"])
async def test_a_stream_of_warm_jobs_survives_a_death_at_any_moment(
    victim: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = seed_of_the_run()
    order, queue = random.Random(seed), project.queue
    assert run_oracle(queue.dsn, "--install").returncode == 0
    queue.dsn = as_host(queue.dsn, "app")
    make_model(project.folder / "models" / "acme" / "tiny", "llama")
    chosen = {"base_model": "acme/tiny", "lora_rank": 4, "num_epochs": 5}

    def insert() -> UUID:
        return project.insert(lines=conversations(32), hyperparameters=chosen, max_attempts=100)

    def start(name: str) -> DaemonProcess:
        return project.daemon(name, command=REAL, checkpoint_seconds=1)

    def rage(stream: Stream) -> None:
        early = project.folder / "jobs" / ".early"
        moments: dict[str, Callable[[], object]] = {
            "waiting": stream.trainers,
            "beginning": stream.below_trainers,
            "loading": lambda: stream.stage() == "loading",
            "training": lambda: stream.stage() == "training",
            "the next dataset is here": lambda: early.is_dir() and any(early.iterdir()),
            "saving": lambda: stream.stage() in {"saving", "uploading"},
        }
        for moment in order.sample(list(moments), len(moments)):
            stream.await_moment(moments[moment])
            time.sleep(order.choice([0.0, 0.02, 0.2, 0.6]))
            below = {"trainer": stream.trainers, "fork": stream.below_trainers, "daemon": list}[victim]()
            stream.kill(moment, victim, below)
        stream.calm()

    stream = Stream(queue, start, insert)
    begun = time.monotonic()
    try:
        await asyncio.to_thread(rage, stream)
    finally:
        stream.daemon.kill()
        with capsys.disabled():
            print(f"\nseed {seed}, {time.monotonic() - begun:.0f} s: {stream.kills}")
    stream.assert_all_completed()
    assert list((project.folder / "jobs" / ".early").iterdir()) == []
    # What a daemon had still to remove when it died goes by its age; compiled kernels stay for the next jobs.
    left = {path.name for path in (project.folder / "jobs").iterdir()}
    assert victim == "daemon" or left - {".kernels"} == {".early"}
    objects = project.storage.path_of("", "")
    verdict = await asyncio.to_thread(
        run_oracle, as_host(queue.dsn.partition("?")[0], "oracle"),
        "--storage", str(objects), "--processes-of", str(project.folder),
    )  # fmt: skip
    assert verdict.returncode == 0, f"seed {seed}\n{verdict.stdout}{verdict.stderr}"


def test_a_job_on_several_places_survives_the_death_of_any_of_its_processes_at_any_moment(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = seed_of_the_run()
    order = random.Random(seed)
    assert run_oracle(queue.dsn, "--install").returncode == 0
    queue.dsn = as_host(queue.dsn, "app")
    make_model(tmp_path / "models" / "acme" / "tiny", "qwen3")
    chosen = {"base_model": "acme/tiny", "lora_rank": 4, "num_epochs": 6}
    jobs: list[UUID] = []

    def insert() -> UUID:
        jobs.append(
            queue.insert(
                lines=conversations(40), hyperparameters=chosen, gpu_config=Jsonb({"num_gpus": 2}), max_attempts=100
            )
        )
        return jobs[-1]

    def start(name: str) -> DaemonProcess:
        # TrainerPool wait on both places between the jobs, and make room for the ranks.
        return queue.daemon(tmp_path, name=name, command=REAL, slots=2, checkpoint_seconds=0.2)

    def found(pattern: str) -> bool:
        return any(tmp_path.glob(f"jobs/*/{pattern}"))

    stream = Stream(queue, start, insert)

    def both() -> bool:
        return len(stream.below_trainers()) == 2

    moments: dict[str, Callable[[], object]] = {
        "start": both,
        "loading": lambda: both() and stream.stage() == "loading",
        "first step": lambda: both() and stream.stage() == "training",
        "checkpoint": lambda: both() and found("checkpoints/e*/.staging"),
        "end": lambda: both() and found("attempts/e*/metrics_chart.png"),
    }
    begun = time.monotonic()
    try:
        for moment in order.sample(list(moments), len(moments)):
            stream.await_moment(moments[moment])
            time.sleep(order.choice([0.0, 0.02, 0.2]))
            ranks, launchers = stream.below_trainers(), stream.trainers()
            # Those that had waited there are gone: the ranks have the places to themselves.
            assert len(launchers) == 1, stream.tell()
            victim = order.choice(["launcher", "a rank", "daemon"])
            below = {"launcher": launchers, "a rank": [order.choice(ranks)] if ranks else [], "daemon": []}[victim]
            stream.kill(moment, victim, below)
            eventually(lambda: gone(ranks), seconds=SECONDS, why=stream.tell)  # noqa: B023 - asked at once
        stream.calm()
    finally:
        stream.daemon.kill()
        with capsys.disabled():
            print(f"\nseed {seed}, {time.monotonic() - begun:.0f} s: {stream.kills}")
    stream.assert_all_completed()
    verdict = run_oracle(
        as_host(queue.dsn.partition("?")[0], "oracle"),
        "--storage", str(tmp_path / "storage"), "--processes-of", str(tmp_path),
    )  # fmt: skip
    assert verdict.returncode == 0, f"seed {seed}\n{verdict.stdout}{verdict.stderr}"
