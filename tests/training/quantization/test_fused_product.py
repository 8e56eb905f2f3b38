"""The fused kernel equals the reference, layer by layer and tile by tile, and only what does is ever chosen.

Triton's interpreter runs the kernel on a CPU, in a process of its own (interpreted_products.py). Triton is a
requirement of the tests: without it they fail. Its compiler needs no card either.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.forked_process import PipedProcess, forker
from tests.paths import ROOT, TRAINER_PYTHON
from tests.training.conftest import ON_A_CARD
from training.quantization.choose_product import choose_products
from training.quantization.grouped_product import UNPACKED, Choice, Implementation, Kind, product_of_few_rows
from training.quantization.nf4 import pack, pieces_of, unpack_experts

# A quarter of a minute of CPU, on machines that also do other work. Made once a run: one worker has all of it.
pytestmark = [pytest.mark.timeout(600), pytest.mark.together]

_HERE = Path(__file__).parent
# A row of bf16 results is off by 2**-9 of its length after rounding; a wrong weight or row by far more than 2**-7.
_ALLOWED = {"torch.float32": 1e-5, "torch.bfloat16": 2**-8}


def _run(script: str, *arguments: str) -> Any:
    with TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        process = PipedProcess(forker(str(TRAINER_PYTHON)), environment, ROOT, str(_HERE / script), *arguments)
        told, errors = process.communicate(1000)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(told)


@pytest.fixture(scope="module")
def report() -> Any:
    return _run("interpreted_products.py")


def _assert_right(products: list[dict[str, Any]]) -> None:
    wrong = [product for product in products if not product["error"] < _ALLOWED[product["type"]]]
    assert not wrong


def test_the_fused_product_equals_the_reference_for_every_shape(report: Any) -> None:
    assert len(report["products"]) == 13
    _assert_right(report["products"])


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_the_same_holds_for_larger_shapes_and_all_heights() -> None:
    report = _run("interpreted_products.py", "large")
    _assert_right(report["products"])
    _assert_right(report["moving"])
    assert report["tiles"]
    _assert_layers_right(report["layers"])


def test_rows_are_moved_and_added_up_as_by_plain_operations(report: Any) -> None:
    assert len(report["moving"]) == 4
    _assert_right(report["moving"])


def test_the_list_of_tiles_equals_that_of_a_loop(report: Any) -> None:
    assert report["tiles"]


def test_a_layer_is_the_same_in_both_orders_with_and_without_gate(report: Any) -> None:
    _assert_layers_right(report["layers"])


def _assert_layers_right(layers: list[dict[str, Any]]) -> None:
    assert {layer["name"].rpartition(", fused")[0] for layer in layers} > {"gate", "transposed, with bias", "no gate"}
    wrong = [layer for layer in layers if not layer["error"] < 1e-5]
    assert not wrong


def test_of_those_that_are_right_the_fastest_is_chosen(report: Any) -> None:
    choice = report["choices"]["all are right"]
    assert not choice["faults"]
    # A quarter of the tokens, and all of them; two experts a token.
    assert choice["rows"] == [4, 16]
    for tokens, chosen in zip(("2", "8"), choice["chosen"], strict=True):
        assert chosen == min(choice["milliseconds"][tokens], key=choice["milliseconds"][tokens].get)
    assert choice["chosen"][1] in choice["text"] and "8 tokens" in choice["text"]


def test_a_resumed_attempt_keeps_the_choice_of_the_one_before(report: Any) -> None:
    choice = report["choices"]["resumed"]
    assert choice["chosen"] == ["unpacked", "fused by 16 rows, rows moved by kernels"]
    assert not choice["milliseconds"] and "as in the attempt before" in choice["text"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("one_row_wrong", "differs from the reference"),
        ("not_a_number", "differs from the reference"),
        ("does_not_compile", "RuntimeError: PassManager::run failed"),
        ("a_row_goes_astray", "moved by kernels, differs"),
    ],
)
def test_what_is_wrong_here_is_never_chosen(report: Any, fault: str, reason: str) -> None:
    choice = report["choices"][fault]
    assert choice["chosen"] == ["unpacked", "unpacked"]
    (name,) = choice["faults"]
    assert name == "fused by 16 rows, rows moved by kernels" and reason in choice["faults"][name]


def test_the_kernel_compiles_for_hopper_and_ampere() -> None:
    _assert_compiled(_run("compiled_products.py", "90", "80"))


@pytest.mark.system
@pytest.mark.timeout(600)
def test_the_kernel_compiles_for_every_generation() -> None:
    _assert_compiled(_run("compiled_products.py", "80", "86", "89", "90", "100", "120", "all"))


def _assert_compiled(kernels: list[dict[str, Any]]) -> None:
    assert kernels
    for kernel in kernels:
        # sm_86, 89 and 120 give a block 99 KiB.
        assert kernel["shared"] <= 99 * 1024, kernel
        # Registers that spill go through memory in the innermost loop.
        assert kernel["spilled"] == 0, kernel
        assert kernel["uses"], f"no tensor cores: {kernel}"


def test_unpacking_some_experts_gives_the_bits_of_unpacking_all() -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn(7, 40, 64, dtype=torch.bfloat16)
    packed, state = pack(pieces_of(weight), weight.shape, weight.dtype, weight.device)
    chosen = torch.tensor([6, 0, 3, 3])
    assert torch.equal(unpack_experts(packed, state, chosen), bnb.dequantize_4bit(packed, state)[chosen])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_few_rows_equal_the_product_with_all_experts(is_transposed: bool) -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn(16, 64, 128)
    packed, state = pack(pieces_of(weight), weight.shape, weight.dtype, weight.device)
    expert, rows = torch.tensor([2, 2, 11]), torch.randn(3, 64 if is_transposed else 128)
    whole = bnb.dequantize_4bit(packed, state)
    expected = torch.stack(
        [row @ (whole[e] if is_transposed else whole[e].t()) for row, e in zip(rows, expert, strict=True)]
    )
    found = product_of_few_rows(rows, packed, state, expert, is_transposed=is_transposed)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_choice_holds_for_micro_batches_up_to_its_size() -> None:
    fused = Implementation(Kind.FUSED, 64)
    choice = Choice(((100, UNPACKED), (400, fused)))
    assert [choice.of(rows) for rows in (1, 100, 101, 400, 5000)] == [UNPACKED, UNPACKED, fused, fused, fused]


def test_a_model_without_experts_has_nothing_to_choose() -> None:
    assert choose_products(torch.nn.Linear(8, 8), 100) == []


@ON_A_CARD
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_real_widths_of_the_80b_are_right_on_this_card(is_transposed: bool) -> None:
    """Every implementation proves itself here, and the choice is what the story will say."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from training.quantization.experts import expert_states, set_product, unpack_once_for_backward

    config = Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=512, num_experts=512, num_experts_per_tok=10)
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.is_transposed = is_transposed
    for name in ("gate_up_proj", "down_proj"):
        shape = module.get_parameter(name).shape
        shape = torch.Size((shape[0], shape[2], shape[1])) if is_transposed else shape
        weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02
        packed, state = pack(pieces_of(weight), shape, torch.bfloat16, weight.device)
        expert_states(module)[name] = state
        module.register_parameter(name, torch.nn.Parameter(packed, requires_grad=False))
    unpack_once_for_backward(module)
    (tried,) = choose_products(torch.nn.ModuleList([module]), 8192)
    set_product(module, None)
    assert not tried.faults, tried.faults
    assert any(name.startswith("fused") for name in tried.milliseconds["8192"]), str(tried)
