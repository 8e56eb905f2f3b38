"""Fixtures of the trainer's tests: tiny models made once a run, and a child process that is really started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import make_model, write_conversations
from training.spec import Hyperparameters, JobSpec

ModelOf = Callable[[str], Path]
SpecOf = Callable[..., JobSpec]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """tiny("qwen3_next") is the folder of that model, made when first asked for."""
    root = tmp_path_factory.mktemp("models")

    def make(architecture: str) -> Path:
        folder = root / architecture
        return folder if folder.is_dir() else make_model(folder, architecture)

    return make


@pytest.fixture
def spec_of(tiny: ModelOf, tmp_path: Path) -> SpecOf:
    """A spec over a tiny model with 24 conversations; keywords beyond JobSpec's own become hyperparameters."""

    def make(architecture: str = "qwen3", **changes: object) -> JobSpec:
        name = str(changes.pop("name", "job"))
        top = {key: changes.pop(key) for key in list(changes) if key in JobSpec.model_fields}
        chosen = {"num_epochs": 2, "lora_rank": 4, "learning_rate": 5e-3, **changes}
        root = tmp_path / name
        (root / "work").mkdir(parents=True)
        if "dataset_path" not in top:
            top["dataset_path"] = write_conversations(root / "data.jsonl", 24)
        return JobSpec.model_validate(
            {
                "job_id": name,
                "base_model": f"tiny/{architecture}",
                "model_path": tiny(architecture),
                "work_dir": root / "work",
                "checkpoint_dir": root / "checkpoints",
                "output_dir": root / "adapter",
                "hyperparameters": Hyperparameters.model_validate(chosen),
                **top,
            }
        )

    return make
