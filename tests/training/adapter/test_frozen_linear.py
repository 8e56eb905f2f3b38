"""LoRA on a frozen linear layer in one function: PEFT's numbers with less memory, and PEFT's own layers elsewhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

import training.adapter.lora
from benchmarks.count_traffic import Traffic
from tests.tiny_models import ARCHITECTURES
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, ROUNDING, ModelOf, SpecOf, train
from training.adapter import frozen_linear
from training.adapter.frozen_linear import use_one_function
from training.adapter.lora import attach_adapter
from training.base.dtype import compute_dtype
from training.base.load import load_base_model
from training.compute import ComputeType
from training.files.model_folder import open_model_folder
from training.quantization.dequantized_cache import keep_unpacked

WIDE, NARROW, RANK = 128, 96, 8
KINDS = ("plain", "with bias", "4 bits", "4 bits, kept unpacked")


class _SameDraw(torch.nn.Module):
    """PEFT's dropout with the masks that our function draws from the same seed."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        dropped = flat * frozen_linear._kept(flat, self.share, frozen_linear._new_seed()) / (1 - self.share)
        return dropped.view(x.shape)


def _pair(kind: str, dtype: torch.dtype, device: str, dropout: float = 0.0, **config: Any) -> tuple[Any, Any]:
    """Returns the same adapted layer in PEFT's way and in ours."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    if kind.startswith("4 bits"):
        model.proj = Linear4bit(WIDE, NARROW, bias=False, compute_dtype=dtype, quant_type="nf4")
        model.is_loaded_in_4bit = True
    else:
        model.proj = torch.nn.Linear(WIDE, NARROW, bias=kind == "with bias")
    model = model.to(dtype).requires_grad_(False).to(device)
    chosen = {"r": RANK, "lora_alpha": 24, "lora_dropout": dropout, "target_modules": ["proj"], **config}
    theirs = inject_adapter_in_model(LoraConfig(**chosen), model)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            # B begins at zero, which would hide half of the function.
            parameter.data = torch.randn(parameter.shape, device=device) / 8
    if isinstance(theirs.proj.get_base_layer(), Linear4bit):
        theirs.proj.get_base_layer().support_avx512bf16_for_cpu = False
    ours = copy.deepcopy(theirs)
    assert use_one_function(ours) == 1
    if kind == "4 bits, kept unpacked":
        assert keep_unpacked(ours, 2**30).weights == keep_unpacked(theirs, 2**30).weights == 1
    if dropout:
        theirs.proj.lora_dropout["default"] = _SameDraw(dropout)
    return theirs.proj.train(), ours.proj.train()


def _rows(dtype: torch.dtype, device: str, *shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, WIDE, dtype=dtype, device=device)


def _results(layer: Any, rows: torch.Tensor, run: Callable[..., torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Output and gradients, from the same random numbers."""
    rows = rows.clone().requires_grad_(True)
    layer.zero_grad()
    torch.manual_seed(2)
    out = layer(rows) if run is None else run(layer, rows)
    torch.manual_seed(3)
    # float32 numbers first, so that they are the same in both types.
    out.backward(torch.randn(out.shape).to(out))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.grad.dtype is b.grad.dtype is torch.float32 and rows.grad is not None
    return {"out": out.detach(), "x": rows.grad, "A": a.grad.clone(), "B": b.grad.clone()}


def _apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert all(ours[name].dtype is theirs[name].dtype and ours[name].shape == theirs[name].shape for name in theirs)
    return max(float((ours[name].double() - theirs[name]).norm() / theirs[name].double().norm()) for name in theirs)


@ON_A_CARD_TOO
@IN_BOTH_TYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_its_output_and_gradients_are_those_of_peft(
    kind: str, dropout: float, compute_type: ComputeType, device: str
) -> None:
    dtype = compute_dtype(device, compute_type)
    theirs, ours = _pair(kind, dtype, device, dropout)
    for shape in ((2, 17), (5,), (3, 1)):
        rows = _rows(dtype, device, *shape)
        assert _apart(_results(ours, rows), _results(theirs, rows)) < (
            1e-5 if compute_type == "float32" else ROUNDING["bfloat16"]
        )


def test_in_bfloat16_it_is_as_close_to_the_truth_as_peft_within_a_rounding() -> None:
    exact, _ = _pair("plain", torch.float32, "cpu")
    theirs, ours = _pair("plain", torch.bfloat16, "cpu")
    exact.get_base_layer().weight.data = theirs.get_base_layer().weight.data.float()
    rows = _rows(torch.bfloat16, "cpu", 64)
    truth = _results(exact, rows.float())
    narrowed = {name: value.to(_results(ours, rows)[name].dtype) for name, value in truth.items()}
    assert _apart(_results(ours, rows), narrowed) < _apart(_results(theirs, rows), narrowed) + 2**-8


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_lie_apart_in_memory_and_none_at_all_are_right(kind: str) -> None:
    theirs, ours = _pair(kind, torch.float32, "cpu")
    turned = _rows(torch.float32, "cpu", 4, 3).transpose(0, 1)
    assert _apart(_results(ours, turned), _results(theirs, turned)) < 1e-6
    assert ours(_rows(torch.float32, "cpu", 0)).shape == (0, NARROW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_layer_whose_input_needs_no_gradient_trains(kind: str) -> None:
    theirs, ours = _pair(kind, torch.float32, "cpu")
    rows = _rows(torch.float32, "cpu", 4)
    for layer in (theirs, ours):
        layer(rows).square().sum().backward()
    for side in ("lora_A", "lora_B"):
        mine, its = (getattr(layer, side)["default"].weight.grad for layer in (ours, theirs))
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-4)


@ON_A_CARD_TOO
def test_recomputed_activations_draw_the_same_dropout(device: str) -> None:
    dtype = compute_dtype(device)
    _, ours = _pair("4 bits", dtype, device, dropout=0.5)
    rows = _rows(dtype, device, 33)
    kept = _results(ours, rows)
    again = _results(ours, rows, lambda layer, rows: checkpoint(layer, rows, use_reentrant=False))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    torch.manual_seed(5)
    first, second = ours(rows), ours(rows)
    assert not torch.equal(first, second), "each pass draws its own mask"
    assert torch.equal(ours.eval()(rows), ours(rows)), "and none outside training"


@ON_A_CARD_TOO
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_dropout_drops_the_share_that_was_asked_for(share: float, device: str) -> None:
    kept = frozen_linear._kept(torch.empty(400, 500, device=device), share, seed=7)
    assert abs(float(kept.double().mean()) - (1 - share)) < 5 * math.sqrt(share * (1 - share) / kept.numel())


@contextmanager
def _saved() -> Iterator[list[torch.Tensor]]:
    """Lists what autograd keeps meanwhile."""
    tensors: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


def _memory(layer: Any, rows: torch.Tensor) -> tuple[int, int]:
    """Returns the bytes kept for backward, without weights and input, and the peak of a whole pass."""
    layer.zero_grad(set_to_none=True)
    old = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), rows)}
    with Traffic() as traffic, _saved() as kept:
        traffic.ignore([*layer.parameters(), rows])
        out = layer(rows)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        out.sum().backward()
    return sum(size for place, size in storages.items() if place not in old), traffic.peak_bytes


@IN_BOTH_TYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["plain", "4 bits"])
def test_it_keeps_tokens_times_rank_and_peaks_below_peft(kind: str, dropout: float, compute_type: ComputeType) -> None:
    dtype = compute_dtype("cpu", compute_type)
    theirs, ours = _pair(kind, dtype, "cpu", dropout)
    rows = _rows(dtype, "cpu", 512).requires_grad_(True)
    narrow_weights = RANK * (WIDE + NARROW) * dtype.itemsize if dtype is torch.bfloat16 else 0
    (our_kept, our_peak), (their_kept, their_peak) = _memory(ours, rows), _memory(theirs, rows)
    assert our_kept == 512 * RANK * dtype.itemsize + narrow_weights
    assert our_peak < their_peak
    if dtype is torch.float32 and not dropout:
        # Nothing to copy or to draw: PEFT keeps no more than this either.
        assert our_kept == their_kept
    else:
        assert our_kept < their_kept


def test_a_4_bit_weight_is_kept_packed() -> None:
    _, ours = _pair("4 bits", torch.float32, "cpu")
    with _saved() as kept:
        ours(_rows(torch.float32, "cpu", 4).requires_grad_(True))
    assert [tensor.dtype for tensor in kept if tensor.numel() >= WIDE * NARROW / 2] == [torch.uint8]


def _base_alone(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer.get_base_layer()(rows)
    return out


@pytest.mark.parametrize("kind", ["plain", "4 bits"])
def test_what_the_function_does_not_know_is_done_as_peft_does_it(kind: str) -> None:
    rows = _rows(torch.float32, "cpu", 6)
    theirs, ours = _pair(kind, torch.float32, "cpu")
    for layer in (theirs, ours):
        layer.enable_adapters(False)
    assert torch.equal(ours(rows), _base_alone(ours, rows))
    for layer in (theirs, ours):
        layer.enable_adapters(True)
        layer.merge()
    assert ours.merged and torch.equal(ours(rows), theirs(rows))
    for layer in (theirs, ours):
        layer.unmerge()
    assert torch.allclose(ours(rows), theirs(rows), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(rows), theirs(rows))
    for layer in (theirs, ours):
        torch.manual_seed(4)
        layer.update_layer("second", RANK, lora_alpha=8, config=LoraConfig(r=RANK, init_lora_weights=False))
        layer.set_adapter(["default", "second"])
    assert torch.equal(ours(rows), theirs(rows))


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=lambda config: next(iter(config))
)
def test_variants_of_lora_are_those_of_peft(config: dict[str, Any]) -> None:
    theirs, ours = _pair("with bias", torch.float32, "cpu", **config)
    rows = _rows(torch.float32, "cpu", 6)
    assert _apart(_results(ours, rows), _results(theirs, rows)) < 1e-6


@pytest.mark.parametrize("quantize", [True, False], ids=["4 bits", "16 bits"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_adapted_layer_of_a_model_computes_in_one_function(
    architecture: str, quantize: bool, tiny: ModelOf, spec_of: SpecOf
) -> None:
    spec = spec_of(architecture, quantize=quantize)
    model = load_base_model(spec, open_model_folder(spec.model_path, spec.base_model))
    adapted = attach_adapter(model, spec.hyperparameters)
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    assert layers and all(isinstance(layer, frozen_linear._OneFunction) for layer in layers)


@IN_BOTH_TYPES
def test_a_job_makes_the_steps_of_one_with_pefts_own_layers(
    compute_type: ComputeType, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"lora_dropout": 0.0, "learning_rate": 1e-3, "validation_fraction": 0.0}
    ours = train(spec_of("llama", name="ours", **chosen)).all("progress")
    monkeypatch.setattr(training.adapter.lora, "use_one_function", lambda _model: 0)
    theirs = train(spec_of("llama", name="theirs", **chosen)).all("progress")
    assert len(ours) == len(theirs) >= 6
    for mine, its in zip(ours, theirs, strict=True):
        assert math.isclose(mine.loss, its.loss, rel_tol=ROUNDING[compute_type])
        assert math.isclose(mine.grad_norm, its.grad_norm, rel_tol=10 * ROUNDING[compute_type])
