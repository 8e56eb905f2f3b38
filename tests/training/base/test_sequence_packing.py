"""Texts are packed if none of them sees another, in either type; otherwise the job's events say why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from daemon.demo.model import find_gguf
from tests.tiny_models import make_model
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, ModelOf, RecordedEvents, SpecOf
from training.base.dtype import compute_dtype
from training.base.load import load_base_model
from training.base.sequence_packing import why_not_packed
from training.compute import ComputeType
from training.data.micro_batches import pack
from training.files.model_folder import open_model_folder
from training.recipe import may_pack


def _load(folder: Path, compute_type: ComputeType) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype("cpu", compute_type)).eval()


@ON_A_CARD_TOO
@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "mixtral"])
def test_what_keeps_texts_apart_is_packed(architecture: str, spec_of: SpecOf) -> None:
    spec = spec_of(architecture)
    voice = RecordedEvents()
    assert may_pack(spec, load_base_model(spec, open_model_folder(spec.model_path, "tiny")), voice)
    assert not voice.heard


@pytest.fixture(scope="module")
def real_model() -> Any:
    """SmolLM2-135M-Instruct, whose logits are as large as those of any trained model."""
    return AutoModelForCausalLM.from_pretrained(
        find_gguf().parent,
        gguf_file=find_gguf().name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )


# Slow: the model is unpacked from GGUF. A tiny model below tests the rounding alone.
# bfloat16 first: converting float32 back to bfloat16 would round a second time.
@pytest.mark.system
@pytest.mark.parametrize("compute_type", ["bfloat16", "float32"])
def test_a_real_model_is_packed_though_two_layouts_never_give_it_equal_numbers(
    compute_type: ComputeType, real_model: Any
) -> None:
    """In bfloat16 a logit of 20 is rounded to an eighth: numbers differ between layouts, though nothing leaks."""
    model = real_model.to(compute_dtype("cpu", compute_type)).eval()
    texts = [torch.arange(1, 8), torch.arange(9, 14)]
    with torch.no_grad():
        together = model(**pack(texts), use_cache=False).logits.float()
        apart = torch.cat([model(input_ids=text[None], use_cache=False).logits.float() for text in texts], dim=1)
    assert torch.allclose(together, apart, rtol=2e-2, atol=2e-2) == (compute_type == "float32")
    assert why_not_packed(model) is None
    assert "carry one conversation into the next" in str(why_not_packed(_Borderless(model)))


@IN_BOTH_TYPES
def test_an_architecture_that_says_so_itself_is_padded_and_the_story_has_its_words(
    compute_type: ComputeType, spec_of: SpecOf, tiny: ModelOf
) -> None:
    for asked in (None, True):
        voice = RecordedEvents()
        spec = spec_of("qwen3_next", name=f"packing-{asked}", packing=asked)
        assert not may_pack(spec, _load(tiny("qwen3_next"), compute_type), voice)
        (notice,) = voice.all("notice")
        assert notice.code == "packing_refused" and "can't keep packed sequences apart" in notice.data["reason"]
    voice = RecordedEvents()
    assert not may_pack(spec_of(packing=False), _load(tiny("qwen3"), compute_type), voice)
    assert not voice.heard, "nobody asked for it"


class _Borderless(torch.nn.Module):
    """A model that does not know where a text ends: attention and linear attention without their kernels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **_borders: Any) -> Any:
        return self.model(input_ids=input_ids, use_cache=False)


@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "qwen3_next"])
def test_a_model_that_carries_one_text_into_the_next_is_found_out(
    architecture: str, compute_type: ComputeType, tiny: ModelOf
) -> None:
    reason = why_not_packed(_Borderless(_load(tiny(architecture), compute_type)))
    assert reason is not None and "carry one conversation into the next" in reason


class _Rounded(_Borderless):
    """Keeps texts apart but rounds differently when they are packed: as much as SmolLM2-135M does in bfloat16."""

    def forward(self, input_ids: torch.Tensor, **borders: Any) -> Any:
        found = self.model(input_ids=input_ids, **borders)
        if "position_ids" in borders:
            found.logits[..., ::2] *= 1.016
            found.logits[..., 1::2] *= 0.984
        return found


@IN_BOTH_TYPES
def test_a_model_that_only_rounds_packed_texts_otherwise_is_packed(compute_type: ComputeType, tiny: ModelOf) -> None:
    assert why_not_packed(_Rounded(_load(tiny("llama"), compute_type))) is None


class _Shifted(_Borderless):
    """Keeps texts apart but reads them differently when they are packed: at positions three times as far apart."""

    def forward(self, input_ids: torch.Tensor, **borders: Any) -> Any:
        if "position_ids" in borders:
            borders["position_ids"] = borders["position_ids"] * 3
        return self.model(input_ids=input_ids, **borders)


@IN_BOTH_TYPES
def test_a_model_that_reads_packed_texts_otherwise_than_apart_is_found_out(
    compute_type: ComputeType, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "llama", initializer_range=0.2)
    reason = why_not_packed(_Shifted(_load(folder, compute_type)))
    assert reason is not None and "otherwise than apart" in reason
