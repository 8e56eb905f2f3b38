"""Killed after every single step, dense or mixture, a run ends with the adapter of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import write_conversations
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, RecordedEvents, SpecOf, train
from training.events import AnyEvent
from training.recipe import train_adapter
from training.spec import JobSpec
from training.stop_switch import StopSwitch

# Eight runs in a row, on machines that also do other work.
pytestmark = pytest.mark.timeout(600)

# Dropout and evaluation are what a resumed run gets wrong first: both depend on state outside the weights.
_CHOSEN = {"num_epochs": 2, "lora_dropout": 0.1, "validation_fraction": 0.2}


class _Killed(BaseException):
    """Like a kill: it is never caught, and nothing is cleaned up."""


class _FatalVoice(RecordedEvents):
    """Dies while reporting a step."""

    def __init__(self, job_id: str, fatal_step: int) -> None:
        super().__init__(job_id)
        self._fatal_step = fatal_step

    def say(self, event: AnyEvent) -> None:
        super().say(event)
        if event.kind == "progress" and event.step == self._fatal_step:
            raise _Killed


def _killed_at(spec: JobSpec, step: int) -> RecordedEvents:
    voice = _FatalVoice(spec.job_id, step)
    with pytest.raises(_Killed):
        train_adapter(spec, voice, StopSwitch())
    return voice


def _adapter(spec: JobSpec) -> bytes:
    return (spec.output_dir / "adapter_model.safetensors").read_bytes()


def _damage(checkpoint: Path) -> None:
    file = max((path for path in checkpoint.rglob("*.safetensors")), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.system
@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_next"])
def test_killed_after_every_step_it_ends_with_the_same_bits(architecture: str, spec_of: SpecOf, tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "few.jsonl", 15)
    whole = spec_of(architecture, name="whole", dataset_path=data, **_CHOSEN)
    expected = train(whole)
    total = expected.all("planned")[0].total_steps
    assert total >= 6 and len(expected.all("evaluated")) == 3
    killed = spec_of(architecture, name="killed", dataset_path=data, checkpoint_seconds=0.0001, **_CHOSEN)
    for step in range(1, total + 1):
        voice = _killed_at(killed, step)
        made = [event.step for event in voice.all("progress")]
        # Each attempt continues from the step before; the checkpoint of the fatal step was never written.
        assert made == ([step] if step == 1 else [step - 1, step])
    last = train(killed)
    assert _adapter(killed) == _adapter(whole)
    (told,), (known,) = last.all("adapter_saved"), expected.all("adapter_saved")
    for key in ("final_validation_loss", "total_steps", "tokens"):
        assert told.summary.get(key) == known.summary.get(key)
    # The library's own token count restarts at zero; ours continues.
    assert last.all("progress")[-1].tokens_seen == expected.all("progress")[-1].tokens_seen


@ON_A_CARD_TOO
@IN_BOTH_TYPES
def test_a_damaged_checkpoint_costs_its_steps_and_changes_nothing(spec_of: SpecOf, tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "few.jsonl", 15)
    whole = spec_of(name="whole", dataset_path=data, **_CHOSEN)
    train(whole)
    killed = spec_of(name="killed", dataset_path=data, checkpoint_seconds=0.0001, **_CHOSEN)
    _killed_at(killed, 5)
    _damage(killed.checkpoint_dir / "checkpoint-4")
    voice = train(killed)
    passed_over, resumed = voice.all("notice")[:2]
    assert passed_over.code == "checkpoint_passed_over" and "checkpoint-4 is not used" in passed_over.message
    assert "a different hash" in passed_over.message
    assert resumed.code == "resumed" and resumed.data["step"] == 3
    assert voice.all("progress")[0].step == 4
    assert _adapter(killed) == _adapter(whole)
    lost = spec_of(name="both", dataset_path=data, checkpoint_seconds=0.0001, **_CHOSEN)
    _killed_at(lost, 5)
    for step in (3, 4):
        _damage(lost.checkpoint_dir / f"checkpoint-{step}")
    voice = train(lost)
    assert voice.all("progress")[0].step == 1 and "resumed" not in [event.code for event in voice.all("notice")]
    assert _adapter(lost) == _adapter(whole)
