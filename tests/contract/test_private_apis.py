"""What we use of libraries without their promise: each such name in one file, and there when the library is renewed.

A test that fails here after an upgrade says what went, and where to look: compare the library's code with that of the
version that is named, mend the one file, and put the new version here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from psycopg import AsyncConnection
from psycopg.waiting import wait_async

from tests.paths import ROOT
from training.quick_imports import quick_imports

# The first of all test files to import them: the later ones find them as the trainer has them, sooner.
with quick_imports():
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.core_model_loading import MergeModulelist, WeightConverter
    from transformers.integrations.moe import _grouped_mm, use_experts_implementation
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CHECKED_WITH = {"torch": "2.13.0", "transformers": "5.23.0", "psycopg": "3.3.9"}

# Every private name of a library that our code uses, and the only files that may.
IN_USE = {
    # The product of rows with their experts' weights, with transformers' own choice of kernel.
    "_grouped_mm": {"training/quantization/grouped_product.py"},
    # What says that a module holds fused experts, and how their two projections are joined.
    "_apply_gate": {"training/quantization/experts.py"},
    # The conversion that makes fused experts of single ones, remade with our packing in it.
    "_original_source_patterns": {"training/quantization/experts.py"},
    "_original_target_patterns": {"training/quantization/experts.py"},
    # Under which name a model's attention is registered: the public call sets it and tells nobody.
    "_attn_implementation": {"training/attention/registered.py"},
    # The operators under torch.nn.attention.varlen, whose public function has no gradient for what sinks need.
    "_flash_attention_forward": {"training/attention/varlen.py"},
    "_flash_attention_backward": {"training/attention/varlen.py"},
    # The compiled chat template: the public call takes no clock of ours.
    "_compile_jinja_template": {"training/data/template/rendering.py"},
    # A model without weights, of exactly this class: AutoModelForCausalLM would choose by the configuration.
    "_from_config": {"training/base/architecture.py"},
    # Keeps transformers from initialising weights that we have put in their place.
    "_is_hf_initialized": {"training/quantization/experts.py"},
    # What an architecture itself keeps in 32 bits.
    "_keep_in_fp32_modules": {"training/quantization/weights_to_pack.py"},
    # The base class of all convolutions, and a module's own parameters: as old as torch, without another way.
    "_ConvNd": {"training/quantization/weights_to_pack.py"},
    "_parameters": {
        "training/quantization/dequantized_cache.py",
        "training/quantization/disk_copy.py",
        "training/quantization/experts.py",
        "training/quantization/weights_to_pack.py",
    },
    "_buffers": {"training/quantization/disk_copy.py"},
}
# Modules that their library does not document; psycopg.pq, libpq's wrapper, is documented.
MODULES_IN_USE = {"psycopg.waiting": {"daemon/database/connection.py"}}
# Python's own, documented in spite of their names.
DOCUMENTED = {"_exit", "__"}


def checked_with(library: str) -> str:
    return f"checked with {library} {CHECKED_WITH[library]}, here is {version(library)}"


def sources() -> Iterator[tuple[str, ast.Module]]:
    for room in ("daemon", "training"):
        for file in sorted((ROOT / room).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names with an underscore that this file takes from outside: imported, read of an object, or asked for by name."""
    own = set(names_made_here(tree))
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] not in ("daemon", "training"):
                yield from (name for part in node.names for name in (*module.split("."), part.name) if is_private(name))
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                yield name
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                if is_private(name) and name not in own:
                    yield name


def names_made_here(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls")) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def test_every_private_name_is_known_and_stays_in_its_file() -> None:
    found: dict[str, set[str]] = {}
    for file, tree in sources():
        for name in private_names(tree):
            found.setdefault(name, set()).add(file)
    assert found == IN_USE


def test_every_undocumented_module_is_known_and_stays_in_its_file() -> None:
    found = {
        module: {file for file, tree in sources() for name in imported_modules(tree) if name == module}
        for module in MODULES_IN_USE
    }
    assert found == MODULES_IN_USE


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)):
                yield module
                yield from (f"{module}.{part.name}" for part in node.names)
            case ast.Import(names=names):
                yield from (part.name for part in names)


@pytest.mark.parametrize("library", CHECKED_WITH)
def test_the_version_that_was_checked_is_the_one_that_is_pinned(library: str) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pinned[library] == CHECKED_WITH[library], (
        f"{library} is pinned to {pinned[library]}: read how it does what this file tests, then name it above"
    )


def test_grouped_mm_takes_rows_weights_and_ends() -> None:
    assert list(inspect.signature(_grouped_mm).parameters) == ["input", "weight", "offs"], checked_with("transformers")
    rows, weights = torch.randn(5, 8), torch.randn(2, 8, 4)
    product = _grouped_mm(rows, weights, torch.tensor([2, 5], dtype=torch.int32))
    expected = torch.cat([rows[:2] @ weights[0], rows[2:] @ weights[1]])
    assert torch.allclose(product, expected, atol=1e-6), checked_with("transformers")


def test_fused_experts_are_known_by_what_their_decorator_gives_them() -> None:
    @use_experts_implementation
    class Experts(torch.nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()

        def forward(self) -> None: ...

    given = Path(inspect.getsourcefile(use_experts_implementation) or "").read_text()
    assert hasattr(Experts, "_apply_gate") and "is_transposed" in given, checked_with("transformers")


def test_a_weight_conversion_keeps_the_patterns_that_it_was_made_with() -> None:
    conversion = WeightConverter(["experts.*.up_proj.weight"], ["experts.up_proj"], [MergeModulelist()])
    assert list(conversion._original_source_patterns) == ["experts.*.up_proj.weight"], checked_with("transformers")
    assert list(conversion._original_target_patterns) == ["experts.up_proj"], checked_with("transformers")


def test_flash_attention_takes_texts_by_their_ends_and_gives_the_logarithms_of_its_sums() -> None:
    forward, backward = (
        getattr(torch.ops.aten, f"_flash_attention_{way}").default._schema for way in ("forward", "backward")
    )
    taken = [argument.name for argument in forward.arguments]
    assert taken[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ], checked_with("torch")  # fmt: skip
    assert [result.name for result in forward.returns][:3] == ["output", "softmax_logsumexp", "rng_state"]
    taken = [argument.name for argument in backward.arguments]
    assert taken[:14] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
        "dropout_p", "is_causal", "rng_state", "unused",
    ], checked_with("torch")  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= {argument.name for argument in forward.arguments}


def test_a_model_is_asked_for_the_name_of_its_attention() -> None:
    config = importlib.import_module("transformers").LlamaConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=8
    )
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa", checked_with("transformers")


def test_a_module_marked_as_initialised_is_left_alone() -> None:
    assert "_is_hf_initialized" in inspect.getsource(PreTrainedModel._initialize_weights), checked_with("transformers")


def test_an_architecture_names_what_it_keeps_in_32_bits() -> None:
    assert PreTrainedModel._keep_in_fp32_modules is None, checked_with("transformers")


def test_a_module_holds_its_parameters_and_buffers_by_name() -> None:
    layer = torch.nn.BatchNorm1d(2)
    assert list(layer._parameters) == ["weight", "bias"], checked_with("torch")
    assert "running_mean" in layer._buffers, checked_with("torch")
    conv = importlib.import_module("torch.nn.modules.conv")
    assert issubclass(torch.nn.Conv1d, conv._ConvNd), checked_with("torch")


def test_torch_says_which_units_for_bfloat16_it_found() -> None:
    """Asked by tests/training/test_compute.py alone: our own code reads /proc/cpuinfo, before torch is imported."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        assert callable(getattr(torch.cpu, name, None)), f"torch.cpu.{name} is gone: {checked_with('torch')}"


def test_each_architecture_has_one_class_of_causal_model() -> None:
    """training/base/load.py takes it from the public mapping, which was made to hold several once."""
    several = {kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if not isinstance(name, str)}
    assert several == set(), checked_with("transformers")
    assert AutoModelForCausalLM._model_mapping is importlib.import_module("transformers").MODEL_FOR_CAUSAL_LM_MAPPING


def test_a_connection_of_psycopgs_waits_by_the_method_that_we_override() -> None:
    assert list(inspect.signature(AsyncConnection.wait).parameters) == ["self", "gen", "interval", "timeout"], (
        checked_with("psycopg")
    )
    assert [*inspect.signature(wait_async).parameters][:2] == ["gen", "fileno"], checked_with("psycopg")
