"""Kernels that would fail in the first backward are recognised by their versions, before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.paths import ROOT
from tests.training.conftest import ModelOf, RecordedEvents, SpecOf
from training.base.load import warn_of_missing_kernels
from training.failures import TrainingFailed
from training.kernels import fault_of_kernels

_HOPPER, _AMPERE, _BLACKWELL = (9, 0), (8, 0), (10, 0)
# Imports between the packages are not needed: the code under test looks only at metadata and find_spec.
_FLA = "raise AssertionError('fla was imported')\n"

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs distributions of these versions on the path, as pip leaves them."""

    def make(**versions: str | None) -> Path:
        for module, number in versions.items():
            if number is None:
                continue
            name = "fla-core" if module == "fla" else module
            # Of Triton only the metadata: torch would import the module if it found one, and needs a complete one.
            if module != "triton":
                (tmp_path / module).mkdir()
                (tmp_path / module / "__init__.py").write_text(_FLA if module == "fla" else "")
            info = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("capability", "fla", "triton", "tilelang", "is_wrong"),
    [
        # The Triton of torch 2.9.1, 2.11 and 2.13; the last is in the image.
        (_HOPPER, "0.6.0", "3.5.1", None, True),
        (_HOPPER, "0.6.0", "3.6.0", None, True),
        (_HOPPER, "0.6.0", "3.7.1", None, False),
        (_HOPPER, "0.6.0", "3.3.1", None, False),
        (_HOPPER, "0.6.0", "3.4.0", None, True),
        (_HOPPER, "0.6.0", "3.7.0", None, True),
        (_HOPPER, "0.6.0", "3.7.1rc1", None, True),
        (_HOPPER, "0.6.0", "3.5.1+git0b4a0b3", None, True),
        (_HOPPER, "0.6.0", "3.8.0", None, False),
        (_HOPPER, "0.6.0", "3.5.1", "0.1.9", False),
        (_AMPERE, "0.6.0", "3.5.1", None, False),
        (_BLACKWELL, "0.6.0", "3.5.1", None, False),
        (None, "0.6.0", "3.5.1", None, False),
        (_HOPPER, None, "3.5.1", None, False),
        (_HOPPER, "0.6.0", None, None, False),
    ],
)
def test_wrong_kernels_are_known_by_card_and_versions(
    capability: tuple[int, int] | None,
    fla: str | None,
    triton: str | None,
    tilelang: str | None,
    is_wrong: bool,
    install: Install,
) -> None:
    install(fla=fla, triton=triton, tilelang=tilelang)
    fault = fault_of_kernels(capability)
    assert (fault is not None) == is_wrong
    if fault is not None:
        assert f"flash-linear-attention {fla}" in fault and f"Triton {triton}" in fault and "2.13.0" in fault


@pytest.mark.parametrize(("triton", "is_hidden"), [("3.5.1", True), ("3.7.1", False)])
def test_a_trainer_hides_wrong_kernels_before_transformers_chooses_them(
    triton: str, is_hidden: bool, install: Install
) -> None:
    """In a separate process: transformers imports fla with Qwen3-Next's module, and uses plain PyTorch without it."""
    folder = install(fla="0.6.0", triton=triton)
    code = (
        "import training.kernels as kernels; kernels.capability_by_nvml = lambda: (9, 0)\n"
        "kernels.hide_wrong_kernels()\n"
        "import importlib.util; print(importlib.util.find_spec('fla') is None)\n"
    )
    if is_hidden:
        code += "from training.quick_imports import quick_imports\n"
        code += "with quick_imports(): import transformers.models.qwen3_next.modeling_qwen3_next\n"
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(is_hidden)


def test_hidden_kernels_are_told_in_the_story_and_seen_ones_refused_in_words(
    install: Install, spec_of: SpecOf, tiny: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(fla="0.6.0", triton="3.5.1")
    monkeypatch.setattr("training.base.load.capability_by_nvml", lambda: _HOPPER)
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3_next"))
    spec = spec_of("qwen3_next", device="cuda")
    with pytest.raises(TrainingFailed, match=r"Triton 3\.5\.1") as refused:
        warn_of_missing_kernels(spec, model, RecordedEvents())
    assert refused.value.code == "model_unsupported" and not refused.value.transient
    monkeypatch.setitem(sys.modules, "fla", None)
    voice = RecordedEvents()
    warn_of_missing_kernels(spec, model, voice)
    (notice,) = voice.all("notice")
    assert notice.code == "kernels_missing" and "Triton 3.5.1" in notice.message and "plain PyTorch" in notice.message
