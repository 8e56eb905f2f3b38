"""How large an adapter will be, from the shapes in the model's files: asked before hours of training."""

from __future__ import annotations

from pathlib import Path

from training.files.model_folder import ModelFolder
from training.spec import Hyperparameters

FLOAT32_BYTES = 4
# Tokenizer, configuration, log and chart beside the weights.
BESIDE_BYTES = 20_000_000


def expected_adapter_bytes(model_dir: Path, hyperparameters: Hyperparameters) -> int:
    """An upper bound in bytes: rank x (in + out) float32 numbers for each projection that may be adapted.

    The trainer finds the exact modules when it has loaded the model; experts are never adapted.
    """
    wanted = hyperparameters.target_modules
    width = 0
    for name, shape in ModelFolder.of(model_dir).tensors():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or ".experts." in name or not name.endswith(".weight"):
            continue
        if any(module.endswith(target) for target in wanted) if wanted else "_proj" in module.rpartition(".")[2]:
            width += sum(shape)
    return hyperparameters.lora_rank * width * FLOAT32_BYTES + BESIDE_BYTES
