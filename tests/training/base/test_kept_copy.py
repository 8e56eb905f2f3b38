"""A folder that keeps only the 4-bit copy is a whole model; if it is not, the error says exactly why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon.base_model.files import Marker, model_bytes, read_marker, verify_hashes
from daemon.base_model.replace_weights import replace_weights
from daemon.errors import JobFailed
from tests.training.conftest import IN_BOTH_TYPES, ModelOf, SpecOf, train
from training.base.load import load_base_model
from training.base.make_quantized_copy import Request, quantize
from training.check import check_spec
from training.compute import ComputeType
from training.failures import TrainingFailed
from training.files.durable_files import sha256_of
from training.files.model_folder import COPY_MANIFEST, KEPT_COPY, ModelFolder, faults_of_model, open_model_folder
from training.spec import JobSpec


def _copy_of(model: Path, copies: Path, compute_type: ComputeType | None) -> Path:
    return Path(str(quantize(model, Request("tiny/model", "cpu", copies, compute_type))["path"]))


@pytest.fixture
def model(tiny: ModelOf, tmp_path: Path) -> Path:
    """A separate folder with a mixture model, as `models pull` leaves one."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen3_moe"), folder)
    weights = folder / "model.safetensors"
    Marker("tiny/model", "abc", sha256={weights.name: sha256_of(weights)}).write(folder)
    return folder


def _spec(spec_of: SpecOf, model: Path, **changes: Any) -> JobSpec:
    return spec_of("qwen3_moe", model_path=model, base_model="tiny/model", **changes)


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 0xFF
    file.write_bytes(content)


@IN_BOTH_TYPES
def test_the_copy_alone_is_a_whole_model_and_trains_the_same_adapter(
    model: Path, compute_type: ComputeType, spec_of: SpecOf, tmp_path: Path
) -> None:
    before = _spec(spec_of, model, name="before", num_epochs=1)
    train(before)
    planned = check_spec(before).estimate
    shapes, size = dict(ModelFolder.of(model).tensors()), model_bytes(model)
    freed = replace_weights(model, _copy_of(model, tmp_path / "copies", compute_type))
    assert freed == size and not list(model.glob("*.safetensors")) and not list((tmp_path / "copies").iterdir())
    assert faults_of_model(model) == [] and verify_hashes(model) == []
    assert 0 < model_bytes(model) < size and dict(ModelFolder.of(model).tensors()) == shapes
    marker = read_marker(model)
    assert marker is not None and marker.revision == "abc" and not marker.sha256
    after = _spec(spec_of, model, name="after", num_epochs=1, dataset_path=before.dataset_path)
    assert check_spec(after).estimate == planned
    train(after)
    weights = "adapter_model.safetensors"
    assert (before.output_dir / weights).read_bytes() == (after.output_dir / weights).read_bytes()


def test_a_damaged_copy_is_found_and_refused_where_nothing_else_is_left(
    model: Path, compute_type: ComputeType, spec_of: SpecOf, tmp_path: Path
) -> None:
    replace_weights(model, _copy_of(model, tmp_path / "copies", compute_type))
    file = next((model / KEPT_COPY).glob("*.safetensors"))
    _flip_a_byte(file)
    assert faults_of_model(model) == [] and file.name in verify_hashes(model)[0]
    with pytest.raises(TrainingFailed) as refused:
        train(_spec(spec_of, model, name="damaged"))
    assert refused.value.code == "model_incomplete"
    assert "all that is kept" in refused.value.message and f"{file.name} has a different hash" in refused.value.message
    assert "models pull tiny/model" in refused.value.hint
    assert file.exists(), "nothing is thrown away"
    file.write_bytes(file.read_bytes()[:-1])
    assert "bytes of" in faults_of_model(model)[0]
    file.unlink()
    assert "missing" in faults_of_model(model)[0]


def test_a_copy_kept_through_an_update_of_the_libraries_says_so_before_a_job_does(
    model: Path, compute_type: ComputeType, spec_of: SpecOf, tmp_path: Path
) -> None:
    replace_weights(model, _copy_of(model, tmp_path / "copies", compute_type))
    manifest = model / KEPT_COPY / COPY_MANIFEST
    content = json.loads(manifest.read_text())
    content["fingerprint"]["versions"]["transformers"] = "5.0.0"
    manifest.write_text(json.dumps(content))
    assert "made with transformers 5.0.0, and" in faults_of_model(model)[0]
    with pytest.raises(TrainingFailed, match=r"made with transformers 5\.0\.0, and"):
        train(_spec(spec_of, model, name="updated"))
    manifest.write_text("[]")
    assert "cannot be read" in faults_of_model(model)[0]


def test_sixteen_bits_from_a_folder_that_keeps_four_are_refused(
    model: Path, compute_type: ComputeType, spec_of: SpecOf, tmp_path: Path
) -> None:
    replace_weights(model, _copy_of(model, tmp_path / "copies", compute_type))
    with pytest.raises(TrainingFailed, match="16 bits were asked for"):
        train(_spec(spec_of, model, quantize=False))


def test_nothing_is_deleted_for_a_copy_that_is_damaged(model: Path, compute_type: ComputeType, tmp_path: Path) -> None:
    copy = _copy_of(model, tmp_path / "copies", compute_type)
    _flip_a_byte(next(copy.glob("*.safetensors")))
    with pytest.raises(JobFailed, match="nothing was deleted"):
        replace_weights(model, copy)
    assert faults_of_model(model) == [] and (model / "model.safetensors").is_file()


def test_nothing_is_deleted_from_the_hubs_cache(model: Path, compute_type: ComputeType, tmp_path: Path) -> None:
    copy = _copy_of(model, tmp_path / "copies", compute_type)
    blob = tmp_path / "blob"
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    with pytest.raises(JobFailed, match="cache"):
        replace_weights(model, copy)
    assert blob.is_file() and copy.is_dir()


def test_a_replacement_that_was_cut_is_whole_at_every_moment_and_is_finished_by_the_next(
    model: Path, compute_type: ComputeType, tmp_path: Path
) -> None:
    """As after a kill between two deletions: the index is gone, a shard is still there."""
    weights = (model / "model.safetensors").read_bytes()
    replace_weights(model, _copy_of(model, tmp_path / "copies", compute_type))
    (model / "model-00002-of-00002.safetensors").write_bytes(weights[:-7])
    assert faults_of_model(model) == []
    folder = open_model_folder(model, "tiny/model")
    assert folder.kept_copy is not None and not folder.shards
    answer = quantize(model, Request("tiny/model", "cpu", tmp_path / "copies", compute_type))
    assert answer["made_before"] and Path(str(answer["path"])) == folder.kept_copy
    assert replace_weights(model, folder.kept_copy) == len(weights) - 7
    assert not list(model.glob("*.safetensors"))


def test_weights_that_were_pulled_again_count_before_the_copy(
    model: Path, compute_type: ComputeType, tmp_path: Path
) -> None:
    weights = (model / "model.safetensors").read_bytes()
    replace_weights(model, _copy_of(model, tmp_path / "copies", compute_type))
    _flip_a_byte(next((model / KEPT_COPY).glob("*.safetensors")))
    (model / "model.safetensors").write_bytes(weights)
    folder = open_model_folder(model, "tiny/model")
    assert folder.kept_copy is None and folder.shards and verify_hashes(model) == []
    with torch.no_grad():
        assert load_base_model(Request("tiny/model", "cpu", None, compute_type), folder)(
            input_ids=torch.arange(3, 9)[None]
        ).logits.any()
