"""The engine that starts ranks gives each of them its own card, and starts none where a card is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.training.conftest import SpecOf

_ENGINE = ROOT / "tests" / "training" / "launch" / "engine_of_notes.py"


def test_a_rank_sees_its_own_card_alone_and_calls_it_0(spec_of: SpecOf, tmp_path: Path) -> None:
    shown = [("cuda", "GPU-5d3a, GPU-91c0"), ("cuda", None), ("cpu", None), ("cuda", "4")]
    # Started, not forked: in a forked process the engine takes half a minute for each case.
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(_ENGINE), str(tmp_path), json.dumps(shown)],
        input=spec_of(num_gpus=2).model_dump_json(),
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    *seen, said = json.loads(ended.stdout)
    assert seen == [["0 GPU-5d3a", "0 GPU-91c0"], ["0 0", "0 1"], ["0 all", "1 all"]]
    assert said == "local_rank 1 exceeds available GPUs in CUDA_VISIBLE_DEVICES=4"
    assert not list((tmp_path / "3").iterdir()), "a rank was started without a card of its own"
