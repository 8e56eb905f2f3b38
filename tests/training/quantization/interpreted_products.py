"""Runs the fused kernel on a CPU by Triton's interpreter, and prints how far it is from the reference, as JSON.

A program of its own: Triton reads TRITON_INTERPRET when it is imported. A process that has it already, as the one from
which the tests fork this, imports its Python files anew, which takes an instant. With `large` it computes what takes
longer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
if "triton" in sys.modules:
    for _name in [name for name in sys.modules if name.partition(".")[0] == "triton" and "._C" not in name]:
        del sys.modules[_name]

import torch
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from triton.runtime.interpreter import interpreter_builder

import training.quantization.choose_product
import training.quantization.fused_product
import training.quantization.fused_rows
from training.quantization.choose_product import choose_products, moved_there_and_back
from training.quantization.experts import (
    nf4_grouped_experts,
    quantise_experts,
    set_product,
    unpack_once_for_backward,
)
from training.quantization.fused_product import TILE_ROWS, list_tiles
from training.quantization.grouped_product import (
    REFERENCE,
    UNPACKED,
    Choice,
    Groups,
    Implementation,
    Kind,
    multiply,
    reference_product,
)
from training.quantization.nf4 import pack, pieces_of

_ALL = Implementation(Kind.FUSED, 16, moves_rows=True)
# Experts, the stored matrix, and each expert's rows.
_SHAPES: dict[str, tuple[int, tuple[int, int], list[int]]] = {
    "ragged ends": (4, (128, 64), [3, 0, 17, 5]),
    "empty experts at both ends": (5, (64, 128), [0, 0, 21, 0, 0]),
    "one row in all": (8, (128, 64), [0, 0, 0, 0, 0, 1, 0, 0]),
    "one expert": (1, (64, 64), [19]),
    "exactly full tiles": (3, (128, 64), [16, 32, 16]),
    "sizes that are no whole tiles": (3, (72, 192), [7, 0, 9]),
}
_MANY = {"512 experts": (512, (16, 64), [3 if expert % 29 == 0 else 0 for expert in range(512)])}
_LARGE = {
    "two tiles of columns and of rows": (2, (200, 256), [130, 65]),
    "a group of tiles that is not full": (24, (256, 128), [17] * 24),
    "the proportions of gpt-oss": (4, (360, 704), [40, 0, 3, 25]),
}


def _errors(experts: int, matrix: tuple[int, int], counts: list[int], dtype: torch.dtype, height: int) -> float:
    """Returns the largest error of a row, relative to its length, over both directions."""
    torch.manual_seed(experts)
    weight = (torch.randn(experts, *matrix) * 0.02).to(dtype)
    packed, state = pack(pieces_of(weight), weight.shape, dtype, weight.device)
    groups = Groups(torch.tensor(counts).cumsum(0).to(torch.int32))
    worst = 0.0
    for along in (True, False):
        rows = torch.randn(sum(counts), matrix[1 if along else 0]).to(dtype)
        product = multiply(rows, packed, state, groups, Implementation(Kind.FUSED, height), along=along)
        expected = reference_product(rows, packed, state, groups.ends_E, along=along)
        assert product.dtype is dtype and product.shape == expected.shape
        worst = max(worst, float(((product.float() - expected).norm(dim=1) / expected.norm(dim=1)).max()))
    return worst


def products(
    shapes: dict[str, Any],
    heights: tuple[int, ...],
    types: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Iterator[dict[str, Any]]:
    for name, (experts, matrix, counts) in shapes.items():
        for dtype in types:
            for height in heights:
                error = _errors(experts, matrix, counts, dtype, height)
                yield {"name": f"{name}, {height}", "type": str(dtype), "error": error}


def lists_of_tiles(seeds: range) -> bool:
    """Compares the list of tiles with one made by a loop, for many uneven groups."""
    for seed in seeds:
        chosen = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 40, (1 + 11 * seed,), generator=chosen) * torch.randint(
            0, 2, (1 + 11 * seed,), generator=chosen
        )
        for height in TILE_ROWS:
            expected, begin = [], 0
            for expert, count in enumerate(counts.tolist()):
                expected += [[expert, row, begin + count] for row in range(begin, begin + count, height)]
                begin += count
            found = list_tiles(counts.cumsum(0).to(torch.int32), begin, height)
            if found[found[:, 0] >= 0].tolist() != expected or (found[len(expected) :, 0] >= 0).any():
                return False
    return True


_SIZES = {"hidden_size": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Both orders of the stored weight, with and without gate and bias.
_MODULES: dict[str, Callable[[int], torch.nn.Module]] = {
    "gate": lambda experts: Qwen3MoeExperts(Qwen3MoeConfig(**_SIZES, num_experts=experts)),
    "transposed, with bias": lambda experts: GptOssExperts(
        GptOssConfig(**_SIZES, num_local_experts=experts, intermediate_size=64, num_hidden_layers=1)
    ),
    "no gate": lambda experts: NemotronHExperts(
        NemotronHConfig(**_SIZES, n_routed_experts=experts, moe_latent_size=None)
    ),
}


def quantised(name: str, experts: int) -> torch.nn.Module:
    module = _MODULES[name](experts)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for stored in ("gate_up_proj", "up_proj", "down_proj"):
        if stored in module._parameters:
            module._parameters[stored] = quantise_experts(module, stored, module._parameters[stored].data)
    return module.requires_grad_(False)


def layers(experts: int, tokens: int) -> Iterator[dict[str, Any]]:
    """A whole layer's experts, forward and backward, by every implementation, compared with unpacking."""
    for name in _MODULES:
        module = quantised(name, experts)
        hidden = torch.randn(tokens, 64)
        weight, chosen = torch.rand(tokens, experts).topk(2, dim=1)
        found = {}
        for implementation in (UNPACKED, REFERENCE, Implementation(Kind.FUSED, 16), _ALL):
            for is_held in (False, True):
                if is_held:
                    unpack_once_for_backward(module)
                set_product(module, Choice(((1 << 30, implementation),)))
                rows = hidden.clone().requires_grad_(True)
                weights = weight.clone().requires_grad_(True)
                out = nf4_grouped_experts(module, rows, chosen, weights)
                (out * hidden).sum().backward()
                found[f"{implementation}{', held' if is_held else ''}"] = (out.detach(), rows.grad, weights.grad)
        for how, others in found.items():
            pairs = zip(others, found["unpacked"], strict=True)
            yield {"name": f"{name}, {how}", "error": max(float((a - b).norm() / b.norm()) for a, b in pairs)}


def choices() -> dict[str, Any]:
    """Who is chosen if all are right, and who is left out."""
    answers = {}

    def choose(earlier: dict[str, Choice] | None = None) -> dict[str, Any]:
        layer = torch.nn.ModuleList([quantised("gate", 6)])
        (tried,) = choose_products(layer, 8, lambda _module, _rows: (UNPACKED, _ALL), earlier=earlier)
        return {
            "chosen": [str(implementation) for _, implementation in tried.choice.by_rows],
            "rows": [rows for rows, _ in tried.choice.by_rows],
            "faults": tried.faults,
            "milliseconds": tried.milliseconds,
            "text": str(tried),
            "shape": tried.shape,
        }

    answers["all are right"] = choose()
    shape, before = answers["all are right"]["shape"], Choice(((4, UNPACKED), (16, _ALL)))
    answers["resumed"] = choose({shape: Choice.from_json(json.loads(json.dumps(before.as_json())))})
    whole = training.quantization.fused_product.fused_product

    def one_row_wrong(*arguments: Any) -> torch.Tensor:
        product = whole(*arguments)
        product[-1] *= 1.05
        return product

    def not_a_number(*arguments: Any) -> torch.Tensor:
        return whole(*arguments) * float("nan")

    def does_not_compile(*_arguments: Any) -> torch.Tensor:
        raise RuntimeError("PassManager::run failed\nand more")

    for fault in (one_row_wrong, not_a_number, does_not_compile):
        training.quantization.fused_product.fused_product = fault
        answers[fault.__name__] = choose({shape: before} if fault is not_a_number else None)
    training.quantization.fused_product.fused_product = whole
    spread = training.quantization.fused_rows.spread_rows
    training.quantization.fused_rows.spread_rows = lambda *arguments: spread(*arguments).roll(1, dims=0)
    answers["a_row_goes_astray"] = choose()
    training.quantization.fused_rows.spread_rows = spread
    return answers


def moving(*widths: int) -> Iterator[dict[str, Any]]:
    """The kernels that move rows, in both types, compared in float32."""
    for width in widths:
        for dtype in (torch.float32, torch.bfloat16):
            chosen = torch.rand(7, 9).topk(3, dim=1)[1]
            hidden, weight = torch.randn(7, width).to(dtype), torch.rand(7, 3).to(dtype)
            fused = moved_there_and_back(hidden, weight, chosen, dtype, is_fused=True)
            plain = moved_there_and_back(hidden, weight, chosen, torch.float32, is_fused=False)
            error = float(((fused - plain).norm(dim=1) / plain.norm(dim=1)).max())
            yield {"name": f"{width} columns", "type": str(dtype), "error": error}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A third of the time: looks in each sum for an overflow, and says what it finds only in debugging.
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    # Twice a layer's timing is enough here, where nothing is learnt from the times.
    training.quantization.choose_product._SECONDS = 0.1
    if "large" in sys.argv:
        report: dict[str, Any] = {
            "products": [*products(_LARGE, TILE_ROWS[1::2]), *products(_MANY, TILE_ROWS[:1])],
            "tiles": lists_of_tiles(range(12)),
            "layers": list(layers(experts=6, tokens=9)),
            "moving": list(moving(1024)),
        }
    else:
        report = {
            "products": [*products(_SHAPES, TILE_ROWS[:1]), *products(_MANY, TILE_ROWS[:1], (torch.float32,))],
            "tiles": lists_of_tiles(range(1, 12, 5)),
            "layers": list(layers(experts=4, tokens=5)),
            # Less than a tile, and one and a half.
            "moving": list(moving(48, 1500)),
            "choices": choices(),
        }
    json.dump(report, sys.stdout)
