"""The trainer's process seen from outside: how each way of ending becomes one verdict. Real processes throughout."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.queue.outcome import Failed
from daemon.stop_request import Stop, StopReason
from daemon.trainer.process import Timeouts, TrainerProcess
from daemon.trainer.verdict import Stopped, Trained, Verdict
from tests.daemon_process import eventually
from tests.paths import SCRIPTED_TRAINER
from training.events import AdapterSaved, ErrorCode, Event, Notice, Progress
from training.spec import Hyperparameters, JobSpec

SCRIPTED = (sys.executable, str(SCRIPTED_TRAINER))
QUICK = Timeouts(stall_seconds=20.0, drain_seconds=5.0, kill_seconds=1.0)


class Run:
    """One scripted child: its verdict and all it said."""

    def __init__(self, folder: Path, script: list[list[Any]]) -> None:
        dataset = folder / "dataset.jsonl"
        dataset.write_text(json.dumps({"script": script}) + "\n")
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.spec = JobSpec(
            job_id="7a5c9c3e-0000-4000-8000-000000000001",
            base_model="tiny",
            model_path=folder,
            dataset_path=dataset,
            work_dir=folder,
            checkpoint_dir=folder / "checkpoints",
            output_dir=folder / "adapter",
            hyperparameters=Hyperparameters(),
        )
        self.log_path = folder / "trainer.log"
        self.stop = Stop()
        self.events: list[Event] = []

    async def verdict(
        self, patience: Timeouts = QUICK, on_event: Callable[[Event], None] = lambda _event: None
    ) -> Verdict:
        def hear(event: Event) -> None:
            self.events.append(event)
            on_event(event)

        child = await TrainerProcess.start(SCRIPTED)
        return await child.run(self.spec, on_event=hear, stop=self.stop, patience=patience, log_path=self.log_path)


def stop_at(run: Run, step: int, reason: StopReason) -> Callable[[Event], None]:
    def hear(event: Event) -> None:
        if isinstance(event, Progress) and event.step == step:
            run.stop.request(reason)

    return hear


def processes_of_group(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def gone(leader: int) -> bool:
    """Waits for the kernel: on a busy machine a process that was killed lives until it is scheduled once more."""
    return eventually(lambda: processes_of_group(leader) == [], seconds=5)


async def test_a_child_that_saves_and_exits_cleanly_has_trained(tmp_path: Path) -> None:
    run = Run(tmp_path, [["steps", 3, 0.0]])
    verdict = await run.verdict()
    (saved,) = (event for event in run.events if isinstance(event, AdapterSaved))
    assert saved.summary and saved.serving
    assert verdict == Trained(tmp_path / "adapter", saved.summary, saved.serving)
    assert [event.step for event in run.events if isinstance(event, Progress)] == [1, 2, 3]


async def test_an_adapter_without_a_clean_exit_is_a_failure(tmp_path: Path) -> None:
    said = ["say", "adapter_saved", {"path": str(tmp_path)}]
    verdict = await Run(tmp_path, [said, ["exit", 3]]).verdict()
    assert isinstance(verdict, Failed) and verdict.code is ErrorCode.INTERNAL and "exit code 3" in verdict.message


async def test_a_clean_exit_without_an_adapter_is_a_failure(tmp_path: Path) -> None:
    verdict = await Run(tmp_path, [["steps", 2, 0.0], ["exit", 0]]).verdict()
    assert isinstance(verdict, Failed) and verdict.transient


async def test_a_named_failure_keeps_its_code_message_and_hint(tmp_path: Path) -> None:
    failure = {"code": "out_of_memory", "message": "24 GiB were not enough.", "hint": "reduce batch_size (current 4)"}
    verdict = await Run(tmp_path, [["print", "last line"], ["say", "failed", failure], ["exit", 1]]).verdict()
    assert isinstance(verdict, Failed)
    assert (verdict.code, verdict.message) == (ErrorCode.OUT_OF_MEMORY, "24 GiB were not enough.")
    assert verdict.hint == "reduce batch_size (current 4)" and not verdict.transient
    assert verdict.stack is not None and "last line" in verdict.stack


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_killed_child_is_a_transient_failure_that_names_the_signal(tmp_path: Path, number: int) -> None:
    verdict = await Run(tmp_path, [["steps", 2, 0.0], ["kill_self", int(number)]]).verdict()
    assert isinstance(verdict, Failed) and verdict.transient and signal.Signals(number).name in verdict.message


async def test_a_silent_child_is_ended_as_stalled_with_its_log_tail(tmp_path: Path) -> None:
    run = Run(tmp_path, [["print", "deadlocked in a kernel"], ["sleep", 60]])
    verdict = await run.verdict(Timeouts(stall_seconds=0.5, kill_seconds=0.2))
    assert isinstance(verdict, Failed) and verdict.code is ErrorCode.STALLED and verdict.transient
    assert verdict.stack is not None and "deadlocked in a kernel" in verdict.stack


@pytest.mark.parametrize("reason", [None, StopReason.CANCELLED])
async def test_a_long_spec_for_a_process_that_does_not_read_it_makes_nobody_wait(
    tmp_path: Path, reason: StopReason | None
) -> None:
    prompts = tuple("x" * 4000 for _ in range(100))
    run = Run(tmp_path, [])
    spec = run.spec.model_copy(update={"hyperparameters": Hyperparameters(sample_prompts=prompts)})
    if reason is not None:
        run.stop.request(reason)
    child = await TrainerProcess.start((sys.executable, "-c", "import time; time.sleep(60)"))
    async with asyncio.timeout(30):
        verdict = await child.run(
            spec,
            on_event=run.events.append,
            stop=run.stop,
            patience=Timeouts(stall_seconds=0.3, kill_seconds=0.3),
            log_path=run.log_path,
        )
    assert verdict == Stopped(reason) if reason else isinstance(verdict, Failed) and verdict.code is ErrorCode.STALLED


async def test_a_cancelled_child_that_ignores_term_is_killed_and_its_grandchild_too(tmp_path: Path) -> None:
    run = Run(tmp_path, [["grandchild"], ["ignore_term"], ["steps", 1000, 0.02]])
    pids: list[int] = []

    def hear(event: Event) -> None:
        if event.kind == "started":
            pids.append(event.pid)
        if isinstance(event, Progress) and event.step == 3:
            assert len(processes_of_group(pids[0])) == 2
            run.stop.request(StopReason.CANCELLED)

    verdict = await run.verdict(Timeouts(kill_seconds=0.3), hear)
    assert verdict == Stopped(StopReason.CANCELLED)
    assert gone(pids[0])


async def test_on_shutdown_the_child_leaves_a_checkpoint_that_the_next_one_resumes(tmp_path: Path) -> None:
    first = Run(tmp_path, [["steps", 50, 0.01]])
    assert await first.verdict(on_event=stop_at(first, 7, StopReason.SHUTDOWN)) == Stopped(StopReason.SHUTDOWN)
    second = Run(tmp_path, [["steps", 50, 0.0]])
    assert isinstance(await second.verdict(), Trained)
    resumed = [event for event in second.events if isinstance(event, Notice)]
    assert resumed and resumed[0].data["step"] >= 7
    assert next(event.step for event in second.events if isinstance(event, Progress)) == resumed[0].data["step"] + 1


async def test_a_second_signal_cuts_the_grace_short(tmp_path: Path) -> None:
    run = Run(tmp_path, [["ignore_term"], ["steps", 1000, 0.02]])

    def hear(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 2:
            run.stop.request(StopReason.SHUTDOWN)
            run.stop.hurry()

    begun = asyncio.get_running_loop().time()
    assert await run.verdict(Timeouts(drain_seconds=60.0), hear) == Stopped(StopReason.SHUTDOWN)
    assert asyncio.get_running_loop().time() - begun < 10.0


async def test_a_lost_lease_overrides_any_other_reason(tmp_path: Path) -> None:
    run = Run(tmp_path, [["steps", 1000, 0.02]])

    def hear(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 2:
            run.stop.request(StopReason.SHUTDOWN)
            run.stop.request(StopReason.LEASE_LOST)

    assert await run.verdict(on_event=hear) == Stopped(StopReason.LEASE_LOST)


async def test_unknown_kinds_and_torn_lines_are_skipped(tmp_path: Path) -> None:
    run = Run(tmp_path, [["raw", '{"kind": "from_the_future", "job_id": "x"}\nnot json\n'], ["steps", 2, 0.0]])
    assert isinstance(await run.verdict(), Trained)
    torn = Run(tmp_path, [["raw", '{"kind": "progress", "st'], ["exit", 1]])
    assert isinstance(await torn.verdict(), Failed)


async def test_no_secret_of_the_daemon_enters_the_childs_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "HF_TOKEN", "RUNPOD_API_KEY", "TRAINER_CALLBACK_SECRETS"):
        monkeypatch.setenv(name, "marked-secret")
    seen = tmp_path / "environment.json"
    await Run(tmp_path, [["environment", str(seen)], ["steps", 1, 0.0]]).verdict()
    environment = json.loads(seen.read_text())
    assert "marked-secret" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"


async def test_a_cancelled_task_leaves_no_process(tmp_path: Path) -> None:
    run = Run(tmp_path, [["grandchild"], ["sleep", 60]])
    started = asyncio.Event()
    pids: list[int] = []

    def hear(event: Event) -> None:
        if event.kind == "started":
            pids.append(event.pid)
            started.set()

    task = asyncio.create_task(run.verdict(on_event=hear))
    await asyncio.wait_for(started.wait(), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert gone(pids[0])
    assert os.getpid()


async def test_a_flood_of_output_keeps_its_last_lines_and_a_bounded_log(tmp_path: Path) -> None:
    script = [["print", "x" * 1_000_000]] * 40 + [["print", "the very last line"], ["exit", 9]]
    verdict = await Run(tmp_path, script).verdict()
    assert isinstance(verdict, Failed) and verdict.stack is not None and verdict.stack.endswith("the very last line")
    assert sum(path.stat().st_size for path in tmp_path.glob("trainer*.log")) < 40_000_000


async def test_a_log_that_cannot_be_opened_stops_no_training_and_leaves_no_process(tmp_path: Path) -> None:
    run = Run(tmp_path, [["print", "the last line"], ["steps", 2, 0.0], ["exit", 3]])
    (tmp_path / "in the way").write_text("a file")
    run.log_path = tmp_path / "in the way" / "trainer.log"
    verdict = await run.verdict()
    assert isinstance(verdict, Failed) and "exit code 3" in verdict.message
    assert verdict.stack is not None and "the last line" in verdict.stack
