"""Each layer that an adapter may change is found in the files of a real model, under the name that it has there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.real_shapes import REAL_SHAPES, WITHOUT_A_CLASS, config_of, published_tensors, skeleton, write_checkpoint
from training.adapter.lora import attach_adapter
from training.export.merge import places
from training.export.merging.base_weights import PublishedWeights
from training.export.merging.deltas import AdaptedLayer, Adapter
from training.export.merging.stored_names import StoredNames
from training.files.model_folder import ModelFolder
from training.spec import Hyperparameters

LAYERS = 4


@pytest.mark.parametrize("name", [name for name in REAL_SHAPES if name not in WITHOUT_A_CLASS])
def test_the_layers_of_a_real_model_are_found_in_its_files(name: str, tmp_path: Path) -> None:
    config = config_of(name, LAYERS, in_16_bits=True)
    write_checkpoint(tmp_path, config, published_tensors(name, LAYERS, in_16_bits=True))
    folder = ModelFolder.of(tmp_path)
    names = StoredNames(folder, name)
    with torch.device("meta"):
        adapted = attach_adapter(skeleton(name, LAYERS), Hyperparameters(num_epochs=1, lora_rank=2))
    layers = {}
    for path, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            outputs, inputs = module.get_base_layer().weight.shape
            layers[path] = AdaptedLayer(path, inputs, outputs, 2, 1.0)
    assert layers
    found = places(Adapter(tmp_path, name, None, layers, 1.0), PublishedWeights(folder), names, name)
    assert len(found) == len(layers)
    # Each in its own layer, whatever else the name has in front of it.
    for stored, layer in found.items():
        assert stored.endswith(layer.module[layer.module.index("layers.") :] + ".weight"), (stored, layer.module)
    assert not any(stored.startswith(("mtp.", "vision")) or "visual" in stored for stored in found)
