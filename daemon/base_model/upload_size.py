"""Estimates the size of an adapter's upload, so that the storage limit is checked before hours of training."""

from __future__ import annotations

from pathlib import Path

from training.files.adapter_size import ADAPTER_BYTES, adapter_parameters
from training.files.model_folder import ModelFolder
from training.spec import Hyperparameters

# Tokenizer, configuration, log and chart beside the weights.
BESIDE_BYTES = 20_000_000


def expected_adapter_bytes(model_dir: Path, hyperparameters: Hyperparameters) -> int:
    """The bytes that the storage must accept. `model_dir` contains a whole model."""
    parameters = adapter_parameters(ModelFolder.of(model_dir).tensors(), hyperparameters)
    return parameters * ADAPTER_BYTES + BESIDE_BYTES
