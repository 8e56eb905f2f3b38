"""The protocol between daemon and trainer, tested with a real process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.tiny_models import write_conversations
from tests.training.conftest import ON_A_CARD_TOO, SpecOf, train
from tests.training.process.child import start
from training.compute import ComputeType
from training.events import EXIT_STOPPED
from training.spec import JobSpec


def _adapter(spec: JobSpec) -> bytes:
    return (spec.output_dir / "adapter_model.safetensors").read_bytes()


@ON_A_CARD_TOO
def test_a_spec_becomes_an_adapter_and_the_events_tell_it_in_order(spec_of: SpecOf) -> None:
    spec = spec_of(name="first", num_epochs=1, sample_prompts=None)
    with start(spec) as child:
        assert child.exit_status() == 0
    kinds = [event.kind for event in child.events]
    assert kinds[:2] == ["started", "stage"] and kinds[-1] == "adapter_saved"
    assert kinds.index("planned") < next(
        index for index, event in enumerate(child.events) if event.kind == "stage" and event.stage == "loading"
    )
    assert spec.output_dir.is_dir() and child.readies == []


def test_a_line_that_is_no_spec_fails_with_its_fields() -> None:
    with start() as child:
        child.send('{"job_id": "x", "surprise": 1}')
        assert child.exit_status() == 1
    failed = child.wait_for("failed")
    assert failed.code == "invalid_spec"
    assert "surprise" in failed.message and "model_path" in failed.message and failed.hint


def test_sigterm_before_a_spec_ends_the_child_at_once() -> None:
    with start() as child:
        _until_it_reads(child.process.pid)
        child.terminate()
        assert child.exit_status(20) == EXIT_STOPPED


@ON_A_CARD_TOO
def test_sigterm_while_training_leaves_a_checkpoint_and_the_next_attempt_ends_the_same(spec_of: SpecOf) -> None:
    whole = spec_of(name="whole", num_epochs=3, lora_dropout=0.1)
    train(whole)
    cut = spec_of(name="cut", num_epochs=3, lora_dropout=0.1, dataset_path=whole.dataset_path)
    with start(cut, forked=True) as child:
        child.wait_for("progress", step=2)
        child.terminate()
        assert child.exit_status() == EXIT_STOPPED
    saved = child.wait_for("checkpoint_saved")
    assert saved.step >= 2 and "adapter_saved" not in [event.kind for event in child.events]
    voice = train(cut)
    assert voice.all("notice")[0].code == "resumed"
    assert voice.all("progress")[0].step == saved.step + 1
    assert _adapter(cut) == _adapter(whole)


# A process takes seconds to start: each type once, with one architecture.
@ON_A_CARD_TOO
@pytest.mark.parametrize(
    ("architecture", "step", "compute_type"), [("qwen3", 4, "float32"), ("qwen3_next", 7, "bfloat16")]
)
def test_kill_9_at_any_step_changes_nothing_in_the_final_adapter(
    architecture: str, step: int, compute_type: ComputeType, spec_of: SpecOf
) -> None:
    chosen = {"num_epochs": 2, "lora_dropout": 0.1}
    whole = spec_of(architecture, name="whole", **chosen)
    expected = train(whole)
    killed = spec_of(architecture, name="killed", dataset_path=whole.dataset_path, checkpoint_seconds=0.001, **chosen)
    with start(killed, forked=True) as child:
        child.wait_for("progress", step=step)
        os.kill(child.process.pid, signal.SIGKILL)
        assert child.exit_status() == -signal.SIGKILL
    voice = train(killed)
    resumed = {event.step: event.loss for event in voice.all("progress")}
    assert resumed and min(resumed) > step - 2
    assert all(event.loss == resumed[event.step] for event in expected.all("progress") if event.step in resumed)
    assert voice.all("evaluated")[-1].validation_loss == expected.all("evaluated")[-1].validation_loss
    assert _adapter(killed) == _adapter(whole)


def test_the_child_ends_when_nobody_listens(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of(num_epochs=50, dataset_path=write_conversations(tmp_path / "many.jsonl", 200))
    with start(spec, forked=True) as child:
        child.wait_for("started")
        child.stop_listening()
        assert child.exit_status(60) == 1


def _until_it_reads(pid: int) -> None:
    """Waits until the process sleeps in a read of its stdin pipe."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if "pipe" in Path(f"/proc/{pid}/wchan").read_text():
            return
        time.sleep(0.02)
    raise AssertionError("the child never read its stdin")
