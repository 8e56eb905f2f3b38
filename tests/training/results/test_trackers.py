"""Experiment trackers: what a job leaves for TensorBoard, and a real W&B client that must never break a training."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.paths import ROOT
from tests.training.conftest import RecordedEvents, SpecOf, train
from tests.training.process.child import start
from training.events import AnyEvent
from training.failures import StopRequested
from training.recipe import train_adapter
from training.results.trackers import TENSORBOARD_FILE
from training.stop_switch import StopSwitch

# The daemon passes a real key; a client that works offline or finds no server never sends it.
KEY = "0123456789abcdef0123456789abcdef01234567"


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) by tag, read from the file's records: length, its crc, payload, its crc (TFRecord)."""
    content, found = path.read_bytes(), dict[str, list[tuple[int, float]]]()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_the_adapter_holds_a_tensorboard_file_with_every_step_and_evaluation(spec_of: SpecOf) -> None:
    spec = spec_of("llama")
    voice = train(spec)
    found = curves(spec.output_dir / TENSORBOARD_FILE)
    told = [(event.step, pytest.approx(event.loss)) for event in voice.all("progress")]
    assert len(told) > 4 and found["train/loss"] == told
    assert found["validation/loss"] == [
        (event.step, pytest.approx(event.validation_loss)) for event in voice.all("evaluated")
    ]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= found.keys()


def test_a_resumed_run_has_curves_without_a_hole(spec_of: SpecOf) -> None:
    spec = spec_of("llama")
    stop = StopSwitch()

    class StopAtThree(RecordedEvents):
        def say(self, event: AnyEvent) -> None:
            super().say(event)
            stop.requested = stop.requested or getattr(event, "step", 0) == 3

    with pytest.raises(StopRequested):
        train_adapter(spec, StopAtThree(spec.job_id), stop)
    voice = train(spec)
    (resumed,) = [event for event in voice.all("notice") if event.code == "resumed"]
    steps = [step for step, _ in curves(spec.output_dir / TENSORBOARD_FILE)["train/loss"]]
    assert resumed.data["step"] >= 3
    assert steps == list(range(1, voice.all("progress")[-1].step + 1))


def test_a_job_that_wants_no_tracker_leaves_no_trace_of_one(spec_of: SpecOf) -> None:
    spec = spec_of("llama", trackers=())
    train(spec)
    assert not (spec.output_dir / TENSORBOARD_FILE).exists()
    assert not [path for path in spec.work_dir.rglob("*") if "tensorboard" in path.name or "wandb" in path.name]


def test_a_trainer_never_imports_boto3_nor_without_a_key_wandb() -> None:
    # transformers' is_wandb_available checks this first, and trl relies on that.
    code = "from training.process.blocked_imports import hide_unwanted_packages as hide; hide(); "
    code += "from importlib.util import find_spec; print(find_spec('boto3'), find_spec('wandb') is not None)"
    for key, printed in (({}, "None False"), ({"WANDB_API_KEY": KEY}, "None True")):
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **key}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == printed


@pytest.mark.system
def test_wandb_gets_the_run_through_the_librarys_own_integration(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    spec = spec_of("llama", trackers=("wandb",))
    with start(spec) as child:
        child.wait_for("adapter_saved", seconds=600)
        assert child.exit_status() == 0
    assert not [event for event in child.events if event.kind == "notice" and "tracker" in event.code]
    (record,) = spec.work_dir.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert b"train/loss" in content and b"eval/loss" in content and spec.job_id.encode() in content
    assert KEY.encode() not in content
    assert not (spec.output_dir / TENSORBOARD_FILE).exists()


def test_a_wandb_that_refuses_the_key_costs_a_notice_and_not_the_training(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client itself checks this: a real key has forty characters.
    monkeypatch.setenv("WANDB_API_KEY", "short")
    spec = spec_of("llama", trackers=("tensorboard", "wandb"))
    voice = train(spec)
    (lost,) = [event for event in voice.all("notice") if event.code == "tracker_lost"]
    assert "40+ characters" in lost.message and voice.kinds()[-1] == "adapter_saved"
    assert (spec.output_dir / TENSORBOARD_FILE).exists()


@pytest.mark.system
def test_a_wandb_that_cannot_be_reached_costs_a_notice_and_not_the_training(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    spec = spec_of("llama", trackers=("tensorboard", "wandb"))
    with start(spec) as child:
        child.wait_for("adapter_saved", seconds=600)
        assert child.exit_status() == 0
    (lost,) = [event for event in child.events if event.kind == "notice" and event.code == "tracker_lost"]
    assert "Weights & Biases" in lost.message
    assert (spec.output_dir / TENSORBOARD_FILE).exists()
