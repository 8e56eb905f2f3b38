"""Without causal-conv1d, flash-linear-attention's own convolution keeps the packed texts of Qwen3-Next apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import DOUBLES, ROOT
from tests.training.conftest import ModelOf

# transformers chooses its kernels when it is imported, so in a process of its own. A CPU stands for the GPU.
_PACK = """
import json, os, sys
from training.quick_imports import quick_imports
with quick_imports():
    import torch
    from training.convolution import convolution_is_offered, offer_fla_convolution
    from training.base.sequence_packing import why_not_packed
    from training.preflight import kernel_proof
offer_fla_convolution(sys.argv[2])
kernel_proof._KEY_HEADS, kernel_proof._VALUE_HEADS, kernel_proof._HEAD_SIZE = 1, 2, 16
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found = {"offered": convolution_is_offered(), "packing": why_not_packed(model)}
found["fault"] = kernel_proof.fault_of_linear_attention("cpu")
os.environ["KERNEL_FAULT"] = "convolution"
found["leaks"] = why_not_packed(model), kernel_proof.fault_of_linear_attention("cpu")
print(json.dumps(found))
"""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_qwen3_next_packs_with_the_convolution_of_flash_linear_attention(
    device: str, tiny: ModelOf, tmp_path: Path
) -> None:
    # Of the doubles, causal-conv1d is not installed.
    shutil.copytree(DOUBLES / "linear_attention" / "fla", tmp_path / "fla")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PACK, str(tiny("qwen3_next")), device],
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    if device == "cpu":
        # A host without a GPU cannot run the kernel: nothing is offered, and conversations are padded.
        assert not found["offered"] and "without `causal_conv1d`" in found["packing"]
        return
    assert found["offered"] and found["packing"] is None and found["fault"] is None
    packing, fault = found["leaks"]
    assert "carry one conversation into the next" in packing and "is off by" in fault
