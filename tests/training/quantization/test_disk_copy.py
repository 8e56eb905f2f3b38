"""The 4-bit copy on the volume is the model that it was made from, or it is not used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, RecordedEvents, SpecOf, train
from training.base.load import load_base_model
from training.files.model_folder import open_model_folder
from training.spec import JobSpec


def _load(spec: JobSpec) -> tuple[Any, RecordedEvents]:
    voice = RecordedEvents()
    return load_base_model(spec, open_model_folder(spec.model_path, spec.base_model), voice), voice


def _copy_in(root: Path) -> Path:
    (found,) = [path for path in root.iterdir() if not path.name.startswith(".")]
    return found


@ON_A_CARD_TOO
@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_next", "mixtral"])
def test_the_copy_gives_bit_for_bit_the_same_logits(
    architecture: str, device: str, spec_of: SpecOf, tmp_path: Path
) -> None:
    spec = spec_of(architecture, quantized_dir=tmp_path / "copies")
    ids_BT = torch.arange(3, 40, device=device)[None]
    first, _ = _load(spec)
    written = _copy_in(tmp_path / "copies").stat().st_mtime_ns
    second, voice = _load(spec)
    assert not voice.heard and _copy_in(tmp_path / "copies").stat().st_mtime_ns == written
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids_BT).logits, second(input_ids=ids_BT).logits)


@IN_BOTH_TYPES
def test_a_run_from_the_copy_ends_with_the_same_adapter(spec_of: SpecOf, tmp_path: Path) -> None:
    first = spec_of("qwen3_moe", name="first", quantized_dir=tmp_path / "copies")
    second = spec_of("qwen3_moe", name="second", quantized_dir=tmp_path / "copies", dataset_path=first.dataset_path)
    train(first)
    train(second)
    weights = "adapter_model.safetensors"
    assert (first.output_dir / weights).read_bytes() == (second.output_dir / weights).read_bytes()


def test_a_flipped_byte_is_noticed_and_the_copy_made_anew(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of("qwen3", quantized_dir=tmp_path / "copies")
    _load(spec)
    file = next(_copy_in(tmp_path / "copies").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 0xFF
    file.write_bytes(content)
    _, voice = _load(spec)
    (notice,) = voice.all("notice")
    assert notice.code == "quantized_copy_refused" and "a different hash" in notice.message
    assert not _load(spec)[1].heard


def test_a_copy_by_other_versions_is_not_used(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of("qwen3", quantized_dir=tmp_path / "copies")
    _load(spec)
    manifest = _copy_in(tmp_path / "copies") / "manifest.json"
    content = json.loads(manifest.read_text())
    content["fingerprint"]["versions"]["bitsandbytes"] = "0.1"
    manifest.write_text(json.dumps(content))
    assert "other versions" in _load(spec)[1].all("notice")[0].message


def test_another_source_gives_another_copy(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of("qwen3", quantized_dir=tmp_path / "copies")
    _load(spec)
    # As after a fresh download: same names and sizes, another mtime.
    os.utime(spec.model_path / "model.safetensors", ns=(1, 1))
    _load(spec)
    assert len(list((tmp_path / "copies").iterdir())) == 2
