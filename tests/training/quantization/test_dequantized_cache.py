"""Weights that stay unpacked: within their memory, never dequantised again, and without any effect on the adapter."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

import training.files.free_memory
import training.quantization.dequantized_cache
import training.recipe
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, RecordedEvents, SpecOf, train
from training.adapter.lora import attach_adapter
from training.base.load import load_base_model
from training.files.free_memory import free_bytes
from training.files.model_folder import open_model_folder
from training.preflight.estimate import Estimate
from training.quantization.dequantized_cache import Kept, keep_unpacked, spare_bytes
from training.quantization.experts import expert_states, has_fused_experts, unpack_once_for_backward

_SHORT = {"num_epochs": 1, "lora_dropout": 0.1}


def _load(spec: Any) -> Any:
    return load_base_model(spec, open_model_folder(spec.model_path, spec.base_model), RecordedEvents())


class _Unpackings:
    """Counts dequantised weights, how many of them are experts, and how many experts are unpacked in memory at once."""

    def __init__(self) -> None:
        self.count = self.experts = self.most_alive = 0
        self._alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self._dequantise = bnb.dequantize_4bit

    def __call__(self, packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
        weight = self._dequantise(packed, state)
        self.count += 1
        if weight.dim() == 3:
            self.experts += 1
            self._alive.add(weight)
            self.most_alive = max(self.most_alive, len(self._alive))
        return weight

    @property
    def alive(self) -> int:
        return len(self._alive)


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> _Unpackings:
    counted = _Unpackings()
    monkeypatch.setattr(bnb, "dequantize_4bit", counted)
    return counted


@dataclass(frozen=True)
class _Step:
    gradients: dict[str, torch.Tensor]
    experts_unpacked: int
    alive_before_backward: int

    def equals(self, other: _Step) -> bool:
        return self.gradients.keys() == other.gradients.keys() and all(
            torch.equal(gradient, other.gradients[name]) for name, gradient in self.gradients.items()
        )


def _step(model: Any, unpackings: _Unpackings) -> _Step:
    ids_BT = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    before = unpackings.experts
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    alive = unpackings.alive
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return _Step(gradients, unpackings.experts - before, alive)


@ON_A_CARD_TOO
@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_the_adapter_is_the_same_to_the_last_bit_however_much_was_kept(
    architecture: str, device: str, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, told = [], []
    # How much fits into this memory depends on the type; in both it is less than everything.
    little = 100_000 if device == "cpu" else 400_000
    for spare in (0, little, 2**30):
        monkeypatch.setattr(training.recipe, "spare_bytes", lambda *_, spare=spare: spare)
        spec = spec_of(architecture, name=f"spare-{spare}", **_SHORT)
        notices = [event for event in train(spec).all("notice") if event.code == "weights_unpacked"]
        told.append([event.data["bytes"] for event in notices])
        adapters.append((spec.output_dir / "adapter_model.safetensors").read_bytes())
    (none, (some,), (everything,)) = told
    assert none == [] and 0 < some <= little < everything
    assert adapters[0] == adapters[1] == adapters[2]


@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3_next", "mixtral"])
def test_what_was_kept_is_never_dequantised_again(architecture: str, spec_of: SpecOf, unpackings: _Unpackings) -> None:
    spec = spec_of(architecture)
    base = _load(spec)
    model = attach_adapter(base, spec.hyperparameters).eval()
    packed = _step(model, unpackings)
    assert packed.experts_unpacked > 0
    before = unpackings.count
    kept = keep_unpacked(base, 2**30)
    assert kept.weights == kept.of_weights == unpackings.count - before
    unpacked = _step(model, unpackings)
    assert unpackings.count == before + kept.weights
    assert unpacked.equals(packed)


@IN_BOTH_TYPES
def test_no_more_is_kept_than_there_are_bytes_for(spec_of: SpecOf) -> None:
    spec = spec_of("qwen3_moe")
    whole = keep_unpacked(_load(spec), 2**40)
    experts = [module for module in _load(spec).modules() if has_fused_experts(module)]
    layer = sum(state.shape.numel() * state.dtype.itemsize for state in expert_states(experts[0]).values())
    assert whole.weights == whole.of_weights and whole.bytes > layer * len(experts)
    for budget in (0, layer, whole.bytes - 1, whole.bytes):
        part = keep_unpacked(_load(spec), budget)
        assert part.bytes <= budget and part.of_weights == whole.of_weights
        assert (part == whole) == (budget >= whole.bytes)
        assert (part == Kept(0, 0, whole.of_weights)) == (budget == 0)


@IN_BOTH_TYPES
def test_recomputing_layers_unpack_twice_and_hold_the_experts_of_one(spec_of: SpecOf, unpackings: _Unpackings) -> None:
    spec = spec_of("qwen3_moe")
    base = _load(spec)
    weights = sum(len(expert_states(module)) for module in base.modules() if has_fused_experts(module))
    model = attach_adapter(base, spec.hyperparameters).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    plain = _step(model, unpackings)
    unpack_once_for_backward(base)
    held = _step(model, unpackings)
    assert (plain.experts_unpacked, held.experts_unpacked) == (3 * weights, 2 * weights)
    assert held.alive_before_backward == 0, "unpacked experts wait for backward"
    assert unpackings.most_alive == 2, "more than the two weights of one layer are held"
    assert held.equals(plain)


def test_half_of_what_is_free_beyond_the_runs_need_may_be_spent(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = Estimate(1, 100, 1, 1, 1, memory_bytes=300, disk_bytes=1, seconds=1.0, cost=None)
    monkeypatch.setattr(training.quantization.dequantized_cache, "free_bytes", lambda: 1200)
    assert spare_bytes(spec_of(name="alone"), needed) == 500
    assert spare_bytes(spec_of(name="four", num_gpus=4), needed) == 50
    assert spare_bytes(spec_of(name="card", device="cuda"), needed) == 0
    monkeypatch.setattr(training.quantization.dequantized_cache, "free_bytes", lambda: 150)
    assert spare_bytes(spec_of(name="tight"), needed) == 0


def test_a_container_has_what_its_limit_leaves_and_cached_files_can_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.files.free_memory, "_CGROUP", tmp_path / "none")
    host = free_bytes()
    assert host > 2**20
    monkeypatch.setattr(training.files.free_memory, "_CGROUP", tmp_path)
    for file, content in (("max", "4096"), ("current", "3000"), ("stat", "anon 10\ninactive_file 1000\n")):
        (tmp_path / f"memory.{file}").write_text(content, encoding="ascii")
    assert free_bytes() == 4096 - 3000 + 1000
    (tmp_path / "memory.max").write_text("max", encoding="ascii")
    assert free_bytes() > 2**20
