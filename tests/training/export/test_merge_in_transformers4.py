"""Transformers 4, in an environment of its own, opens merged models: experts one by one, as the hub has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.other_libraries import TRANSFORMERS_4, library, python_path
from tests.tiny_models import ARCHITECTURES, OTHER_FAMILIES
from tests.training.conftest import ModelOf
from tests.training.export.conftest import AdapterOf
from tests.training.export.test_merge import in_float32, logits
from training.distance import distance
from training.export.merge import merge_adapter

pytestmark = pytest.mark.system

# Opens each folder, and writes beside it what the model says of the same tokens as `logits`.
READER = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
said = {}
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        found = model.eval()(torch.arange(3, 60)[None]).logits
    save_file({"logits": found.contiguous()}, f"{folder}.logits")
    said[folder] = {name: sorted(keys) for name, keys in report.items() if keys} | {
        "tokens": len(AutoTokenizer.from_pretrained(folder))
    }
print(json.dumps(said))
"""


def test_merged_models_open_in_transformers_4(tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path) -> None:
    beside, folders = {}, []
    for family in (*ARCHITECTURES, *OTHER_FAMILIES):
        base = in_float32(tiny(family), tmp_path / family)
        config = json.loads((base / "config.json").read_text())
        if family == "qwen3_moe":
            # Transformers 5 renames this key when it saves a model; the hub's models have the old one.
            (base / "config.json").write_text(json.dumps({**config, "num_experts": config["num_local_experts"]}))
        adapter = adapter_of(base, f"adapter-{family}")
        folder = tmp_path / f"merged-{family}"
        merge_adapter(base, adapter, folder)
        beside[folder] = logits(base, adapter)
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", READER, *folders],
        env=python_path(library(*TRANSFORMERS_4)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for folder, wanted in beside.items():
        assert said[str(folder)].keys() == {"tokens"} and said[str(folder)]["tokens"] > 500
        assert distance(load_file(f"{folder}.logits")["logits"], wanted) < 1e-5, folder.name
