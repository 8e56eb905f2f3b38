"""Kernels are compared with plain PyTorch, forward and backward, before a job rests on them; wrong ones are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

# It chooses its kernels here, before a test puts broken ones on the path.
import transformers.models.qwen3_next.modeling_qwen3_next  # noqa: F401

from tests.forked_process import PipedProcess, forker
from tests.paths import ROOT, TRAINER_PYTHON
from tests.training.conftest import ModelOf, RecordedEvents, SpecOf
from training.base.load import load_base_model, warn_of_missing_kernels
from training.failures import TrainingFailed
from training.files.model_folder import open_model_folder
from training.preflight import kernel_proof
from training.preflight.kernel_proof import fault_of_grouped_products, fault_of_linear_attention, refuse_wrong_kernels

_PROVE = ROOT / "tests" / "training" / "preflight" / "prove_doubles.py"


def test_right_kernels_pass_and_each_wrong_one_is_told_by_what_is_wrong() -> None:
    faults = ("none", "backward", "gradient", "borders", "nan", "convolution", "memory")
    process = PipedProcess(forker(str(TRAINER_PYTHON)), os.environ, ROOT, str(_PROVE), *faults)
    told, errors = process.communicate(120)
    assert process.wait(10) == 0, errors
    found: dict[str, str | None] = json.loads(told.splitlines()[-1])
    assert found.pop("none") is None
    # A GPU that is full says nothing of its kernels.
    assert found.pop("memory") == "raised OutOfMemoryError"
    assert "causal-conv1d" in str(found["convolution"]) and "off by" in str(found.pop("convolution"))
    assert all(str(fault).startswith("fla-core ") and "Triton" in str(fault) for fault in found.values())
    assert "RuntimeError: On Hopper with Triton >= 3.4.0 and < 3.7.1 the gradients are wrong" in str(found["backward"])
    assert "the gradient of k is off by 20%" in str(found["gradient"])
    assert "the output is off by" in str(found["borders"]) and "the output is off by nan" in str(found["nan"])


def test_kernels_that_cannot_be_imported_are_told_for_transformers_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fla.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    fault = fault_of_linear_attention("cpu")
    assert fault == "fla-core cannot be imported (ImportError: libcuda.so.1: cannot open shared object file)"


def test_kernels_that_are_not_installed_have_no_fault() -> None:
    assert fault_of_linear_attention("cpu") is None


def test_grouped_products_are_right_here_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of_grouped_products("cpu") is None
    right = torch.nn.functional.grouped_mm
    # The last expert's rows are multiplied with another's weights.
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda x, w, offs: right(x, w[[0, 1, 2, 2]], offs=offs))
    assert "the output is off by" in str(fault_of_grouped_products("cpu"))


@pytest.mark.parametrize(("architecture", "device"), [("qwen3_next", "cuda"), ("qwen3_next", "cpu"), ("qwen3", "cuda")])
def test_only_a_model_that_would_use_wrong_kernels_is_refused_before_it_is_loaded(
    architecture: str, device: str, spec_of: SpecOf, tiny: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kernel_proof, "fault_of_linear_attention", lambda _device: "fla-core 9: the output is off by 80%"
    )
    folder = open_model_folder(tiny(architecture), architecture)
    if (architecture, device) != ("qwen3_next", "cuda"):
        refuse_wrong_kernels(spec_of(architecture, device=device), folder)
        return
    spec = spec_of(architecture, device=device)
    with pytest.raises(TrainingFailed) as refused:
        refuse_wrong_kernels(spec, folder)
    assert refused.value.code == "model_unsupported" and not refused.value.transient
    assert "fla-core 9: the output is off by 80%" in refused.value.message and "doctor" in refused.value.hint


def test_missing_kernels_are_told_in_the_story_with_the_reason(
    spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("qwen3_next")
    model = load_base_model(spec, open_model_folder(spec.model_path, spec.base_model))
    (tmp_path / "causal_conv1d.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    voice = RecordedEvents()
    warn_of_missing_kernels(spec.model_copy(update={"device": "cuda"}), model, voice)
    (notice,) = voice.all("notice")
    assert notice.code == "kernels_missing" and "flash-linear-attention is not installed" in notice.message
    assert "causal-conv1d cannot be imported (OSError: undefined symbol: _ZN3c10)" in notice.message
    assert "plain PyTorch" in notice.message
