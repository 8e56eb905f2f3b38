"""Fixtures for the trainer's tests: tiny models made once per run, and a real child process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.tiny_models import CARD_SHAPE, make_model, write_conversations
from training.compute import ComputeType
from training.event_writer import EventWriter
from training.events import AnyEvent
from training.quick_imports import quick_imports
from training.spec import Hyperparameters, JobSpec
from training.stop_switch import StopSwitch

# As the trainer imports them; each test file needs some of this.
with quick_imports():
    import training.quantization.choose_product
    import training.recipe
    from training.quantization.choose_product import Trial
    from training.quantization.grouped_product import Implementation


class RecordedEvents(EventWriter):
    """Keeps events in order; the real writer sends them through a pipe."""

    def __init__(self, job_id: str = "job") -> None:
        super().__init__(-1, job_id)
        self.heard: list[AnyEvent] = []

    def say(self, event: AnyEvent) -> None:
        self.heard.append(event)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.heard]

    def all(self, kind: str) -> list[Any]:
        return [event for event in self.heard if event.kind == kind]


def train(spec: JobSpec) -> RecordedEvents:
    """Runs one whole job in this process and returns its events."""
    from training.recipe import train_adapter

    voice = RecordedEvents(spec.job_id)
    train_adapter(spec, voice, StopSwitch())
    return voice


# For tests that compare numbers. The types differ in how they round and in which kernels multiply, and all GPUs use
# the type that few CPUs have units for. So both are tested on every machine.
IN_BOTH_TYPES = pytest.mark.parametrize("compute_type", get_args(ComputeType))

# How far apart two numbers may be that are equal except for rounding. A product of bfloat16 keeps 8 bits: each rounding
# errs by up to 2^-9, and some twenty in a row, through two layers and back, add up like a random walk.
ROUNDING: dict[ComputeType, float] = {"float32": 1e-4, "bfloat16": 20**0.5 * 2**-9}


# What only a card can show, by `pytest -m gpu`.
CARD_MARKS = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def ON_A_CARD(test: Callable[..., None]) -> Callable[..., None]:
    for mark in CARD_MARKS:
        test = mark(test)
    return test


# The same proof on a card as well: nobody has shown on a CPU what CUDA's kernels do.
ON_A_CARD_TOO = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CARD_MARKS)])


@pytest.fixture
def device() -> str:
    """Where a test's models compute. ON_A_CARD_TOO gives the card as well."""
    return "cpu"


@pytest.fixture(autouse=True)
def without_a_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a third of such a short job; our child processes draw, and so does one test in test_adapter.py."""
    monkeypatch.setattr(training.recipe, "draw_chart", lambda _journal, path, title: path.write_bytes(b"\x89PNG"))


@pytest.fixture(autouse=True)
def the_same_product_in_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card: times are noise for tiny models, and jobs that are compared bit by bit must compute in one way. The
    fused kernel, wherever it is right there."""

    def prefer_the_tallest(_module: Any, tokens: int, chosen: Implementation, _seconds: float) -> Trial:
        return Trial(tokens, chosen, seconds=1 / (1 + chosen.moves_rows + chosen.tile_rows))

    monkeypatch.setattr(training.quantization.choose_product, "_time", prefer_the_tallest)


# Callable with the architecture, and with a device if its kernels want a certain width.
ModelOf = Callable[..., Path]
SpecOf = Callable[..., JobSpec]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """tiny("qwen3_next") is the folder of that model, made on first use."""
    root = tmp_path_factory.mktemp("models")

    def make(architecture: str, device: str = "cpu") -> Path:
        folder = root / device / architecture
        shape = CARD_SHAPE[architecture] if device == "cuda" else {}
        return folder if folder.is_dir() else make_model(folder, architecture, **shape)

    return make


@pytest.fixture
def compute_type() -> ComputeType | None:
    """The hardware's type, unless a test chooses one (IN_BOTH_TYPES) or the whole run forces one."""
    forced = os.environ.get("TRAINER_COMPUTE_TYPE", "auto")
    return next((known for known in get_args(ComputeType) if known == forced), None)


@pytest.fixture
def spec_of(tiny: ModelOf, tmp_path: Path, compute_type: ComputeType | None, device: str) -> SpecOf:
    """A spec for a tiny model with 24 conversations and six steps. Keywords unknown to JobSpec are hyperparameters.

    No samples: two before and two after take as long as the steps. `sample_prompts=None` gives a job's default.
    """

    def make(architecture: str = "qwen3", **changes: object) -> JobSpec:
        name = str(changes.pop("name", "job"))
        top = {key: changes.pop(key) for key in list(changes) if key in JobSpec.model_fields}
        chosen = {"num_epochs": 1, "lora_rank": 4, "learning_rate": 5e-3, "sample_prompts": (), **changes}
        root = tmp_path / name
        (root / "work").mkdir(parents=True)
        if "dataset_path" not in top:
            top["dataset_path"] = write_conversations(root / "data.jsonl", 24)
        return JobSpec.model_validate(
            {
                "job_id": name,
                "base_model": f"tiny/{architecture}",
                "model_path": tiny(architecture, device),
                "work_dir": root / "work",
                "checkpoint_dir": root / "checkpoints",
                "output_dir": root / "adapter",
                "compute_type": compute_type,
                "device": device,
                "hyperparameters": Hyperparameters.model_validate(chosen),
                **top,
            }
        )

    return make
