"""TrainerPool that wait for jobs: whose memory they may hold, and when they are given up. Real processes throughout."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

import daemon.trainer.pool
from daemon.host.gpus import Gpu
from daemon.host.inspect import Host
from daemon.settings import Settings
from daemon.stop_request import Stop
from daemon.trainer.pool import TrainerPool
from daemon.trainer.process import Timeouts
from daemon.trainer.verdict import Trained, Verdict
from tests.daemon_process import alive, children_of
from tests.lifecycle.queue import write_model_folder
from tests.paths import SCRIPTED_TRAINER
from training.events import Event
from training.spec import Hyperparameters, JobSpec

SCRIPTED = (sys.executable, str(SCRIPTED_TRAINER))
CPU = Host(device="cpu")
ONE_CARD = Host(device="cuda", gpus=(Gpu(0, "NVIDIA A100 80GB PCIe", 79.6),))
MIB = 2**20


class Site:
    """A host of two slots, its trainers tended as in a daemon."""

    def __init__(
        self, folder: Path, host: Host = CPU, command: tuple[str, ...] = SCRIPTED, slots: int = 2, **changes: Any
    ) -> None:
        self.folder = folder
        write_model_folder(folder / "models" / "tiny")
        given = {"database_url": "postgresql://unused", "models_dir": folder / "models", "default_model": "tiny"}
        settings = Settings(_env_file=None, slots=slots, **(given | changes))
        self.trainers = TrainerPool(settings, host, command)
        self.jobs = 0

    @asynccontextmanager
    async def tended(self) -> AsyncIterator[None]:
        tending = asyncio.create_task(self.trainers.tend())
        try:
            yield
        finally:
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)
        assert trainer_pids() == set(), "a trainer outlived those that tend it"

    async def job(
        self,
        *script: list[Any],
        slots: tuple[int, ...] = (0,),
        hear: Callable[[Event], None] | None = None,
        **how: Any,
    ) -> Verdict:
        self.jobs += 1
        folder = self.folder / f"job-{self.jobs}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "dataset").write_text(json.dumps({"script": [*script, ["steps", 2, 0.0]]}))
        spec = JobSpec(
            job_id=folder.name,
            base_model="tiny",
            model_path=self.folder / "models" / "tiny",
            dataset_path=folder / "dataset",
            work_dir=folder,
            checkpoint_dir=folder / "checkpoints",
            output_dir=folder / "adapter",
            hyperparameters=Hyperparameters(),
            num_gpus=len(slots),
        )
        return await self.trainers.run(
            spec,
            slots,
            on_event=hear or (lambda _event: None),
            stop=Stop(),
            patience=Timeouts(stall_seconds=60.0, kill_seconds=1.0),
            log_path=folder / "trainer.log",
            **how,
        )


def trainer_pids() -> set[int]:
    """Living trainers of this process, which may have other children."""
    found = set()
    for pid in children_of(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"--events-fd" in command:
            found.add(pid)
    return found


async def until(question: Callable[[], Any]) -> Any:
    async with asyncio.timeout(30):
        while not (answer := question()):
            await asyncio.sleep(0.01)
    return answer


async def waiting_trainers(logged: Sequence[Mapping[str, Any]], slots: int) -> set[int]:
    """The trainers of all slots, each in its slot. The process alone is there sooner: a job that came then would be
    given another one."""

    def started() -> set[int]:
        return {line["pid"] for line in logged if line["event"] == "trainer_started"}

    await until(lambda: len(started()) == slots)
    return started()


@pytest.mark.parametrize(
    ("slots", "key", "stay"), [((0, 1), {}, 0), ((0,), {"WANDB_API_KEY": "k"}, 1)], ids=["two_places", "own_key"]
)
async def test_those_that_wait_where_a_job_has_a_process_of_its_own_leave_it_their_memory(
    tmp_path: Path, slots: tuple[int, ...], key: dict[str, str], stay: int
) -> None:
    site = Site(tmp_path)
    present: set[int] = set()

    def hear(event: Event) -> None:
        if event.kind == "started":
            present.update(trainer_pids())

    with capture_logs() as logged:
        async with site.tended():
            waiting = await waiting_trainers(logged, slots=2)
            verdict = await site.job(["sleep", 0.3], slots=slots, hear=hear, own_environment=key)
            assert isinstance(verdict, Trained)
            assert len(present & waiting) == stay and len(present - waiting) == 1
            # Others wait there for the next job.
            await until(lambda: len(trainer_pids() - present) == len(slots))
            assert len(trainer_pids()) == 2


async def test_a_trainer_that_has_grown_is_given_up_and_one_that_has_not_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon.trainer.pool, "GROWTH_BYTES", 64 * MIB)
    monkeypatch.setattr(daemon.trainer.pool, "LOOK_SECONDS", 0.01)
    site = Site(tmp_path, slots=1)
    pids: list[int] = []

    def hear(event: Event) -> None:
        if event.kind == "started":
            pids.append(event.pid)

    with capture_logs() as logged:
        async with site.tended():
            (first,) = await waiting_trainers(logged, slots=1)
            # What its first job leaves is taken for the base model.
            for mib in (100, 30, 100):
                await site.job(["grow", mib * MIB], hear=hear)
                await asyncio.sleep(0.2)
            await until(lambda: not alive(first) and trainer_pids())
    assert pids == [first] * 3
    assert [line["reason"] for line in logged if line["event"] == "warm_trainer_given_up"] == ["grown"]


@pytest.mark.parametrize("warm", ["model", "off"])
async def test_no_descriptor_of_a_job_stays_open_in_the_daemon_however_it_ended(tmp_path: Path, warm: str) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    site = Site(tmp_path, slots=1, warm=warm)
    async with site.tended():
        await site.job()
        before = descriptors()
        for script in ([], [["exit", 3]], [["kill_self", 9]], [["grandchild"], ["exit", 1]], [["raw", "{"]]) * 2:
            await site.job(*script)
        # As before: with one that waits, or with none.
        await site.job()
        await until(lambda: descriptors() <= before)


async def test_a_trainer_that_dies_before_it_is_ready_is_not_started_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon.trainer.pool, "LOOK_SECONDS", 0.02)
    site = Site(tmp_path, command=(sys.executable, "-c", "import sys; sys.exit(3)"), slots=1)
    with capture_logs() as logged:
        async with site.tended():
            await until(lambda: any(line["event"] == "warm_trainer_given_up" for line in logged))
            await asyncio.sleep(0.5)
    assert [line["event"] for line in logged].count("trainer_started") == 1


@pytest.mark.parametrize("host", [CPU, ONE_CARD], ids=["cpu", "card"])
async def test_the_default_model_is_held_before_a_job(tmp_path: Path, host: Host) -> None:
    """For a card too: it waits in the host's memory, which the trainer sees to (training.base.loaded_model)."""
    site = Site(tmp_path, host, slots=1, warm_default_model=True)
    with capture_logs() as logged:
        async with site.tended():
            await until(trainer_pids)
            await until(lambda: site.trainers.bases() == ["", "tiny"])
            await site.job()
    (waits,) = [line for line in logged if line["event"] == "trainer_waits"]
    assert waits["served"] == 2


async def test_a_host_short_of_memory_takes_it_back_from_a_trainer_that_only_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon.trainer.pool, "LOOK_SECONDS", 0.02)
    site = Site(tmp_path, slots=1, warm_default_model=True)
    with capture_logs() as logged:
        async with site.tended():
            await until(lambda: site.trainers.bases() == ["", "tiny"])
            monkeypatch.setattr(daemon.trainer.pool, "free_bytes", lambda: 0)
            await until(lambda: site.trainers.bases() == [])
            # Another waits there, without a model.
            await until(lambda: [line["event"] for line in logged].count("trainer_started") == 2)
            await asyncio.sleep(0.2)
    assert [line["reason"] for line in logged if line["event"] == "warm_trainer_given_up"] == ["memory"]
