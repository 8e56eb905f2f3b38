"""The size that the storage is asked for is the one that the trainer estimates, whatever a family calls its layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemon.base_model.upload_size import BESIDE_BYTES, expected_adapter_bytes
from training.spec import Hyperparameters

# One layer of 8 × 8, in a block of the names that these families give.
ADAPTED = (
    "model.layers.0.self_attn.q_proj.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.self_attention.query_key_value.weight",
    "transformer.h.0.mlp.dense_h_to_4h.weight",
    "model.layers.0.mlp.fc1.weight",
    "model.layers.0.linear_attn.in_proj_qkvz.weight",
)
FROZEN = (
    "lm_head.weight",
    "model.vision_proj.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.mlp.experts.up_proj.weight",
)


def _model_of(folder: Path, tensor: str) -> Path:
    header = json.dumps({tensor: {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    return folder


@pytest.mark.parametrize("tensor", ADAPTED)
def test_the_layers_of_each_family_are_counted(tmp_path: Path, tensor: str) -> None:
    expected = expected_adapter_bytes(_model_of(tmp_path, tensor), Hyperparameters(lora_rank=4))
    assert expected == BESIDE_BYTES + 4 * (8 + 8) * 4


@pytest.mark.parametrize("tensor", FROZEN)
def test_what_stays_frozen_is_not_counted(tmp_path: Path, tensor: str) -> None:
    assert expected_adapter_bytes(_model_of(tmp_path, tensor), Hyperparameters(lora_rank=4)) == BESIDE_BYTES


def test_only_the_layers_that_the_job_names_are_counted(tmp_path: Path) -> None:
    model = _model_of(tmp_path, ADAPTED[0])
    named = Hyperparameters(lora_rank=4, target_modules=("self_attn.q_proj",))
    other = Hyperparameters(lora_rank=4, target_modules=("v_proj",))
    assert expected_adapter_bytes(model, named) > expected_adapter_bytes(model, other) == BESIDE_BYTES
