"""Adapters for exports: made as a job makes them, with weights that are not zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.adapter.describe import Described
from training.adapter.lora import attach_adapter
from training.adapter.save import save_adapter
from training.spec import Hyperparameters, JobSpec

AdapterOf = Callable[..., Path]


@pytest.fixture
def adapter_of(tmp_path: Path) -> AdapterOf:
    """adapter_of(base) is the folder of a new adapter on the model in that folder. Keywords are hyperparameters."""

    def make(base: Path, name: str = "adapter", revision: str | None = None, **chosen: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        chosen = {"num_epochs": 1, "lora_rank": 4, **chosen}
        spec = JobSpec(
            job_id="job",
            base_model=f"tiny/{base.name}",
            model_revision=revision,
            model_path=base,
            dataset_path=base,
            work_dir=tmp_path,
            checkpoint_dir=tmp_path,
            output_dir=tmp_path / name,
            hyperparameters=Hyperparameters.model_validate(chosen),
        )
        adapted = attach_adapter(model, spec.hyperparameters)
        torch.manual_seed(1)
        for path, parameter in adapted.named_parameters():
            if ".lora_B." in path:
                torch.nn.init.normal_(parameter, std=0.1)
        nothing: Any = lambda _config: Described("", {})  # noqa: E731
        save_adapter(spec, adapted, AutoTokenizer.from_pretrained(base), (), nothing)
        return spec.output_dir

    return make
