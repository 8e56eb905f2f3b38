"""The engine that starts ranks gives each of them its own card, and starts none where a card is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.training.conftest import SpecOf

# The engine as the trainer starts it, with ranks that only write down what they see; all cases in one process, since
# what takes time is the import of torch.
_ENGINE = """
import json, os, sys
from pathlib import Path
from torch.distributed.launcher.api import elastic_launch
from training.launch.launcher import launch_config
from training.spec import JobSpec

spec = JobSpec.model_validate_json(sys.stdin.read())
said = []
for number, (device, shown) in enumerate(json.loads(sys.argv[2])):
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ |= {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    seen = Path(sys.argv[1], str(number))
    seen.mkdir()
    note = (
        f"import os, pathlib; pathlib.Path({str(seen)!r}, os.environ['RANK']).write_text("
        "os.environ['LOCAL_RANK'] + ' ' + os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    )
    try:
        elastic_launch(launch_config(spec.model_copy(update={"device": device})), sys.executable)("-c", note)
    except ValueError as error:
        said.append(str(error))
    else:
        said.append([path.read_text() for path in sorted(seen.iterdir())])
print(json.dumps(said))
"""


def test_a_rank_sees_its_own_card_alone_and_calls_it_0(spec_of: SpecOf, tmp_path: Path) -> None:
    shown = [("cuda", "GPU-5d3a, GPU-91c0"), ("cuda", "4,6"), ("cuda", None), ("cpu", None), ("cuda", "4")]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ENGINE, str(tmp_path), json.dumps(shown)],
        input=spec_of(num_gpus=2).model_dump_json(),
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    *seen, said = json.loads(ended.stdout)
    assert seen == [["0 GPU-5d3a", "0 GPU-91c0"], ["0 4", "0 6"], ["0 0", "0 1"], ["0 all", "1 all"]]
    assert said == "local_rank 1 exceeds available GPUs in CUDA_VISIBLE_DEVICES=4"
    assert not list((tmp_path / "4").iterdir()), "a rank was started without a card of its own"
