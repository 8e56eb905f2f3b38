"""The adapter's folder for transformers 4: the same weights, and layers of a mixture named as modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ModelOf
from tests.training.export.conftest import AdapterOf
from training.export.transformers4 import export_transformers4, write_for_transformers4
from training.failures import TrainingFailed
from training.files.durable_files import sha256_of

WEIGHTS = "adapter_model.safetensors"


def read(folder: Path, name: str = "adapter_config.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


def test_a_shared_expert_is_named_by_modules_that_no_routed_expert_shares(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny("qwen3_next"))
    card = 'pip install "peft>=0.17" "transformers>=4.57" accelerate'
    (adapter / "README.md").write_text(card)
    files = {"adapter_config.json": {"bytes": 1, "sha256": "old"}, WEIGHTS: {"bytes": 2, "sha256": "kept"}}
    (adapter / "manifest.json").write_text(json.dumps({"job_id": "j", "files": files, "archive": {"name": "a"}}))
    assert read(adapter)["target_parameters"]
    said = export_transformers4({"adapter": adapter, "into": tmp_path / "for4"}, lambda _done, _total: None)
    folder = tmp_path / "for4"
    assert said["changed"] == ["adapter_config.json", "README.md"]
    config = read(folder)
    assert "target_parameters" not in config and "exclude_modules" not in config
    assert "mlp.shared_expert.down_proj" in config["target_modules"]
    assert "linear_attn.in_proj_qkvz" in config["target_modules"]
    assert (folder / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert '"peft>=0.12,<0.19" "transformers>=4.57,<5"' in (folder / "README.md").read_text()
    manifest = read(folder, "manifest.json")
    assert "archive" not in manifest and manifest["files"][WEIGHTS] == files[WEIGHTS]
    assert manifest["files"]["adapter_config.json"]["sha256"] == sha256_of(folder / "adapter_config.json")
    assert said["files"].keys() == {path.name for path in folder.iterdir()}


def test_a_dense_adapter_opens_as_it_is_and_the_export_says_so(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny("qwen3"))
    assert write_for_transformers4(adapter, tmp_path / "for4") == []
    for file in adapter.iterdir():
        assert (tmp_path / "for4" / file.name).read_bytes() == file.read_bytes()


def test_adapters_of_earlier_versions_get_their_numbers_and_tokenizer_right(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny("qwen3"))
    later = {"lora_alpha": 16.0, "use_qalora": False, "alora_invocation_tokens": None, "exclude_modules": None}
    (adapter / "adapter_config.json").write_text(json.dumps({**read(adapter), **later}))
    tokenizer = {**read(adapter, "tokenizer_config.json"), "tokenizer_class": "TokenizersBackend", "is_local": True}
    (adapter / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert write_for_transformers4(adapter, tmp_path / "for4") == ["adapter_config.json", "tokenizer_config.json"]
    config = read(tmp_path / "for4")
    assert (config["lora_alpha"], type(config["lora_alpha"])) == (16, int)
    assert config.keys().isdisjoint({"use_qalora", "alora_invocation_tokens", "exclude_modules"})
    written = read(tmp_path / "for4", "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "is_local" not in written


def test_what_is_no_adapter_and_a_folder_that_is_there_are_refused(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny("qwen3"))
    with pytest.raises(TrainingFailed, match="exists already"):
        write_for_transformers4(adapter, adapter)
    with pytest.raises(TrainingFailed, match=r"adapter_config\.json cannot be read"):
        write_for_transformers4(tiny("qwen3"), tmp_path / "for4")
