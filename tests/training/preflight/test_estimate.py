"""Compares the estimate with loaded models and attached adapters."""

from __future__ import annotations

from typing import Any

import pytest

import training.loop.loss
from tests.tiny_models import ARCHITECTURES
from tests.training.conftest import IN_BOTH_TYPES, SpecOf
from training.adapter.lora import attach_adapter, trainable_parameters
from training.base.load import count_weights, load_base_model
from training.check import check_spec
from training.files.model_folder import open_model_folder
from training.preflight.estimate import SLICE_TOKENS
from training.quantization.disk_copy import _tensors


@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantize", [True, False], ids=["4 bits", "16 bits"])
def test_weights_and_adapter_are_estimated_as_they_are(architecture: str, quantize: bool, spec_of: SpecOf) -> None:
    spec = spec_of(architecture, quantize=quantize, lora_rank=8)
    estimate = check_spec(spec).estimate
    assert estimate is not None
    model: Any = load_base_model(spec, open_model_folder(spec.model_path, spec.base_model))
    assert estimate["parameters"] == count_weights(model).parameters
    loaded = sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(model))
    # In models this small the fixed tables of the states matter: 16 and 256 numbers each.
    tables = sum(tensor.numel() * tensor.element_size() for name, tensor in _tensors(model) if _is_fixed(name))
    assert estimate["model_bytes"] == pytest.approx(loaded - tables, rel=0.05)
    adapted = attach_adapter(model, spec.hyperparameters)
    assert estimate["adapter_parameters"] == trainable_parameters(adapted)
    assert estimate["adapter_bytes"] == 4 * trainable_parameters(adapted)


def _is_fixed(name: str) -> bool:
    return name.startswith("buffer:") or "quant_map" in name or "quant_state" in name


def test_the_loss_is_sliced_as_the_estimate_believes() -> None:
    assert SLICE_TOKENS == training.loop.loss.SLICE_TOKENS


def test_targets_that_the_job_names_are_estimated(spec_of: SpecOf) -> None:
    whole = check_spec(spec_of(name="whole")).estimate
    few = check_spec(spec_of(name="few", target_modules=("q_proj",))).estimate
    assert whole is not None and few is not None
    assert 0 < few["adapter_parameters"] < whole["adapter_parameters"]
