"""Tests on the shapes of real models which weights must become 4-bit and which are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.real_shapes import REAL_SHAPES, skeleton
from training.failures import TrainingFailed
from training.files.module_names import UNQUANTISED_MODULES
from training.quantization.experts import EXPERTS_FUNCTION, Nf4Config, Nf4Quantizer
from training.quantization.weights_to_pack import left_in_16_bits

# Their experts are no fused experts of the library's, or it has no such model: tests/training/test_real_shapes.py.
_REFUSED = ("Llama-4", "Mistral-Small", "Kimi")
MODELS = [name for name in REAL_SHAPES if not any(refused in name for refused in _REFUSED)]
MIXTURES = [name for name in MODELS if "num_experts_per_tok" in REAL_SHAPES[name].get("text_config", REAL_SHAPES[name])]
# A layer of attention, by the beginning of its name, where it is not k_proj.
_ATTENTION = {"deepseek-ai/DeepSeek-V3": "kv_b_proj", "microsoft/phi-4": "qkv_proj"}


def _prepare(name: str, *left_out: str, quantizer: type[Nf4Quantizer] = Nf4Quantizer) -> Any:
    """Does what loading does to the skeleton before it reads a weight: it asks the quantizer about each one."""
    model = skeleton(name, 4, experts_implementation=EXPERTS_FUNCTION)
    settings = Nf4Config(torch.bfloat16, [*UNQUANTISED_MODULES, *left_out])
    quantizer(settings, pre_quantized=False).preprocess_model(model, device_map={"": "cpu"})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_real_models_are_accepted_with_their_routers_in_16_bits(name: str) -> None:
    model = _prepare(name)
    # Nothing is packed yet: all linear layers and experts are found, but no routers or embeddings.
    left = dict(left_in_16_bits(model, lambda *_: False))
    assert not [path for path in left if path.endswith((".gate.weight", ".router.weight", "embed_tokens.weight"))]
    assert sum(left.values()) > 0.9 * sum(p.numel() for p in model.get_decoder().layers.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_linear_layer_that_was_left_out_is_refused_by_name(name: str) -> None:
    layer = _ATTENTION.get(name, "k_proj")
    with pytest.raises(TrainingFailed, match=rf"did not become 4-bit .* first model\..*layers.\d.self_attn.{layer}"):
        _prepare(name, layer)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_were_left_out_are_refused_by_name(name: str) -> None:
    class Forgetful(Nf4Quantizer):
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return "experts.down_proj" not in param_name and super().param_needs_quantization(model, param_name)

    with pytest.raises(TrainingFailed, match=r"did not become 4-bit .*experts.down_proj") as refused:
        _prepare(name, quantizer=Forgetful)
    assert refused.value.code == "model_unsupported"
