"""The type that a run computes in: chosen by the hardware or on request, and reported in the job's events."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, RecordedEvents, SpecOf, train
from training.base.dtype import compute_dtype
from training.base.load import load_base_model
from training.base.loaded_model import Base
from training.compute import ComputeType, compute_type, cpu_multiplies_bf16
from training.files.model_folder import open_model_folder
from training.quantization.experts import expert_states, has_fused_experts


def test_the_hosts_units_are_those_that_torch_finds() -> None:
    found: Any = torch.cpu
    assert cpu_multiplies_bf16() == (found._is_avx512_bf16_supported() or found._is_amx_tile_supported())


def test_a_card_computes_in_bfloat16_and_whoever_asks_has_what_he_asks_for() -> None:
    assert compute_type("cuda") == "bfloat16"
    assert compute_type("cpu") == ("bfloat16" if cpu_multiplies_bf16() else "float32")
    for device in ("cpu", "cuda"):
        assert compute_type(device, "float32") == "float32" and compute_type(device, "bfloat16") == "bfloat16"


@ON_A_CARD_TOO
@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_every_product_of_a_run_has_its_type_and_the_story_says_which(
    architecture: str, compute_type: ComputeType, spec_of: SpecOf
) -> None:
    spec = spec_of(architecture, num_epochs=1)
    voice = train(spec)
    assert [event.compute_type for event in voice.all("planned")] == [compute_type]
    wanted = compute_dtype("cpu", compute_type)
    model = load_base_model(spec, open_model_folder(spec.model_path, spec.base_model), RecordedEvents())
    linear = [module for module in model.modules() if isinstance(module, Linear4bit)]
    experts = [module for module in model.modules() if has_fused_experts(module)]
    assert linear and bool(experts) == (architecture == "qwen3_moe")
    states = [state for module in experts for state in expert_states(module).values()]
    assert {state.dtype for state in [*states, *(module.weight.quant_state for module in linear)]} == {wanted}
    assert {module.compute_dtype for module in linear} == {wanted}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, wanted}


def test_a_base_model_in_memory_is_not_that_of_a_job_in_the_other_type(spec_of: SpecOf) -> None:
    spec = spec_of()
    bases = {Base.of(spec.model_copy(update={"compute_type": asked})) for asked in ("bfloat16", "float32", None)}
    assert len(bases) == 2


def test_a_checkpoint_of_the_other_type_is_not_continued(spec_of: SpecOf) -> None:
    """Its adapter would match neither a run in the one type nor a run in the other."""
    spec = spec_of(num_epochs=1, checkpoint_seconds=1e-4, compute_type="bfloat16")
    train(spec)
    for asked, code in (("bfloat16", "resumed"), ("float32", "checkpoint_passed_over")):
        voice = train(spec.model_copy(update={"compute_type": asked}))
        notices = {event.code: event.message for event in voice.all("notice")}
        assert code in notices, notices
    assert "compute_type differ" in notices["checkpoint_passed_over"]
