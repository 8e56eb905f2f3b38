"""Four bits in a mixture of experts: all experts are quantised and compute like the same weights dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import training.quantization.experts
from tests.tiny_models import MIXTURES
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, ROUNDING, RecordedEvents, SpecOf
from training.base.load import count_weights, load_base_model
from training.compute import ComputeType
from training.failures import TrainingFailed
from training.files.model_folder import open_model_folder
from training.quantization.experts import expert_states, has_fused_experts
from training.quantization.nf4 import pack
from training.quantization.weights_to_pack import is_in_bytes, refuse_what_is_left


def _load(spec: Any) -> Any:
    return load_base_model(spec, open_model_folder(spec.model_path, spec.base_model), RecordedEvents())


def _dequantised(folder: Path, quantised: Any) -> Any:
    """Returns the same architecture in 16 bits, with exactly the values that the 4-bit weights represent."""
    first = next(quantised.parameters())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=first.dtype).to(first.device)
    modules = dict(reference.named_modules())
    for path, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            modules[path].weight.data = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif has_fused_experts(module):
            for name, state in expert_states(module).items():
                packed = module._parameters[name].data
                getattr(modules[path], name).data = bnb.functional.dequantize_4bit(packed, state)
    return reference.requires_grad_(False)


def _loss_and_gradient(model: Any, ids_BT: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Returns the loss, and its gradient at the embeddings, which has passed through every layer."""
    embedded = model.get_input_embeddings()(ids_BT).detach().requires_grad_(True)
    loss = model(inputs_embeds=embedded, labels=ids_BT).loss
    loss.backward()
    return loss.item(), embedded.grad


@ON_A_CARD_TOO
@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", MIXTURES)
def test_loss_and_gradients_equal_those_of_the_dequantised_weights(
    device: str, architecture: str, compute_type: ComputeType, spec_of: SpecOf
) -> None:
    spec = spec_of(architecture)
    quantised = _load(spec)
    reference = _dequantised(spec.model_path, quantised)
    ids_BT = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)
    loss, gradient = _loss_and_gradient(quantised, ids_BT)
    expected_loss, expected_gradient = _loss_and_gradient(reference, ids_BT)
    assert abs(loss - expected_loss) / expected_loss < ROUNDING[compute_type]
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 2 * ROUNDING[compute_type]


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_take_at_most_0_53_byte_a_parameter(architecture: str, spec_of: SpecOf) -> None:
    model = _load(spec_of(architecture))
    expert_modules = [module for module in model.modules() if has_fused_experts(module)]
    assert expert_modules
    stored = parameters = 0
    for module in expert_modules:
        for name, state in expert_states(module).items():
            stored += module._parameters[name].numel()
            stored += state.absmax.numel() * state.absmax.element_size()
            stored += state.state2.absmax.numel() * state.state2.absmax.element_size()
            parameters += state.shape.numel()
    assert stored / parameters <= 0.53


@IN_BOTH_TYPES
def test_backward_keeps_no_unpacked_weight(spec_of: SpecOf) -> None:
    """Between forward and backward autograd holds packed bytes, never a 16-bit expert."""
    model = _load(spec_of("qwen3_moe"))
    module = next(module for module in model.modules() if has_fused_experts(module))
    full_size = expert_states(module)["gate_up_proj"].shape.numel()
    held: list[int] = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is not torch.uint8:
            held.append(tensor.numel())
        return tensor

    hidden = torch.randn(4, 64, dtype=model.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        module(hidden, torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)).sum()
    assert held and max(held) < full_size


def test_every_linear_layer_but_the_named_few_is_packed(spec_of: SpecOf) -> None:
    model = _load(spec_of("qwen3_next"))
    plain = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, bnb.nn.Linear4bit)
    }
    assert plain == {"lm_head", "in_proj_ba", "shared_expert_gate"}
    assert count_weights(model).quantised_bytes > 0


def test_packing_in_pieces_equals_packing_at_once() -> None:
    weight = torch.randn(6, 128, 96)
    whole, expected = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed, state = pack(iter(weight), weight.shape, weight.dtype, weight.device)
    assert torch.equal(packed, whole)
    assert torch.equal(state.absmax, expected.absmax) and torch.equal(state.state2.absmax, expected.state2.absmax)
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), bnb.functional.dequantize_4bit(whole, expected))


def test_experts_in_the_hubs_layout_are_packed_one_by_one(spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint on disk names single experts, and none of them is stacked in 16 bits on the way."""
    spec = spec_of("qwen3_moe")
    with safe_open(spec.model_path / "model.safetensors", framework="pt") as file:
        assert any(".experts.0.gate_proj.weight" in name for name in file.keys())  # noqa: SIM118 - not a dict
    stacked = []
    monkeypatch.setattr(training.quantization.experts, "quantise_experts", lambda *arguments: stacked.append(arguments))
    _load(spec)
    assert not stacked


def test_a_loaded_model_with_one_plain_layer_is_refused(spec_of: SpecOf) -> None:
    """Even a small one: the demo's model has no linear layer of a million numbers."""
    model = _load(spec_of("qwen3"))
    refuse_what_is_left(model, "tiny/qwen3", is_in_bytes)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(128, 64, dtype=torch.bfloat16), requires_grad=False)
    with pytest.raises(TrainingFailed) as refused:
        refuse_what_is_left(model, "tiny/qwen3", is_in_bytes)
    assert refused.value.code == "model_unsupported"
    assert "did not become 4-bit" in refused.value.message and "up_proj" in refused.value.message
