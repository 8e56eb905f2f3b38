"""Loading needs little more memory than it leaves in use: measured in a separate process against the promised bound."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import benchmarks.load_model
from benchmarks.load_model import TINY, write_checkpoint
from tests.forked_process import PipedProcess, forker
from tests.paths import ROOT, TRAINER_PYTHON

_SMALL = {**TINY, "hidden_size": 512, "moe_intermediate_size": 256}
# What the packing kernel needs beside the weights, whatever their size.
_KERNEL_BYTES = 96 * 2**20


@pytest.mark.system
def test_a_load_peaks_below_what_it_leaves_and_one_layer_in_16_bits(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", layers=4, experts=64, **_SMALL)
    for way in ("bf16, writing the copy", "4-bit copy"):
        loading = ("--child", str(checkpoint), str(tmp_path / "copies"), way, "cpu")
        process = PipedProcess(forker(str(TRAINER_PYTHON)), os.environ, ROOT, benchmarks.load_model.__file__, *loading)
        told, errors = process.communicate(120)
        assert process.wait(10) == 0, errors
        row = json.loads(told.splitlines()[-1])
        assert row["bytes_per_parameter"] <= 0.53
        # The whole model in bf16 would be two hundred megabytes, and twice that in float32.
        assert row["layer"] > 50e6 and row["left"] > 50e6
        assert row["anonymous"] > 0.8 * row["left"], "the load was not seen"
        assert row["peak"] <= row["left"] + row["layer"] + _KERNEL_BYTES, (way, row)
