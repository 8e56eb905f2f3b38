"""Where only the 4-bit copy of a base model is kept, a merge unpacks it: the weights of training, in the old layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from daemon.base_model.replace_weights import replace_weights
from tests.tiny_models import ARCHITECTURES, OTHER_FAMILIES, make_model
from tests.training.conftest import ModelOf
from tests.training.export.conftest import AdapterOf
from tests.training.export.test_merge import TOKENS, in_float32, logits
from training.base.load import load_base_model
from training.base.make_quantized_copy import Request, quantize
from training.distance import distance
from training.export.merge import merge_adapter
from training.failures import TrainingFailed
from training.files.model_folder import ModelFolder, faults_of_model


def keep_the_copy_alone(base: Path, copies: Path) -> None:
    answer = quantize(base, Request("tiny/model", "cpu", copies, "float32"))
    replace_weights(base, Path(str(answer["path"])))


@pytest.mark.parametrize("family", [*ARCHITECTURES, *OTHER_FAMILIES])
def test_the_weights_of_training_are_merged_and_the_layout_is_the_published_one(
    family: str, tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    base = in_float32(tiny(family), tmp_path / family)
    adapter = adapter_of(base)
    published = dict(ModelFolder.of(base).tensors())
    keep_the_copy_alone(base, tmp_path / "copies")
    merged = merge_adapter(base, adapter, tmp_path / "merged")
    folder = Path(merged.path)
    assert merged.is_dequantised
    assert faults_of_model(folder) == [] and dict(ModelFolder.of(folder).tensors()) == published
    trained_on = load_base_model(Request("tiny/model", "cpu", None, "float32"), ModelFolder.of(base))
    with torch.no_grad():
        in_training = PeftModel.from_pretrained(trained_on, adapter).eval()(TOKENS).logits
    assert distance(logits(folder), in_training) < 1e-5
    assert "These weights were in 4 bits" in (folder / "README.md").read_text()
    assert json.loads((folder / "manifest.json").read_text())["is_dequantised"]


def test_a_large_one_becomes_several_files(
    adapter_of: AdapterOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = in_float32(make_model(tmp_path / "bf16", "qwen3_moe"), tmp_path / "base")
    adapter = adapter_of(base)
    keep_the_copy_alone(base, tmp_path / "copies")
    whole = merge_adapter(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("training.export.merging.kept_copy._SHARD_BYTES", 200_000)
    parts = merge_adapter(base, adapter, tmp_path / "parts")
    folder = ModelFolder.of(Path(parts.path))
    assert faults_of_model(folder.path) == [] and len(folder.shards) > 5
    assert logits(folder.path).equal(logits(Path(whole.path)))


def test_a_damaged_copy_is_refused(tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path) -> None:
    base = in_float32(tiny("qwen3"), tmp_path / "base")
    adapter = adapter_of(base)
    keep_the_copy_alone(base, tmp_path / "copies")
    file = next((base / "nf4").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(TrainingFailed) as refused:
        merge_adapter(base, adapter, tmp_path / "merged")
    assert refused.value.code == "model_incomplete"
    assert "has a different hash" in refused.value.message and "models pull" in refused.value.hint
