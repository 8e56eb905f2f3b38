"""A base model that no card can hold: its frozen layers lie in parts on all cards, and come together one at a time.

FSDP-QLoRA by PyTorch's own `fully_shard` (FSDP2), around the frozen weights alone. Each decoder layer's packed 4-bit
weights are cut into as many parts as there are ranks; before a layer computes, forward or backward, its parts are
gathered, and afterwards freed. (bitsandbytes' `quant_storage` is for FSDP1, which lays a layer's weights end to end in
one type; FSDP2 cuts each parameter by itself, bytes as well as floats.) The adapter is not cut: it is small, it is
trained as on one card, and so checkpoints, gradients and the adapter's file are the same with and without this.
Embeddings and head stay whole on each card.

What it costs: each micro-batch moves the model twice between the cards, three times with recomputed activations. A
micro-batch that does not fit cannot be tried again in halves, since the other ranks would wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from bitsandbytes.nn import Linear4bit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from training.base.dtype import device_memory_bytes
from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.model_folder import ModelFolder
from training.preflight.estimate import Estimate
from training.ranks import Ranks
from training.spec import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The share of a card that the frozen weights may take; the rest is for adapter, activations and unpacked layers.
_WEIGHTS_SHARE = 0.75


def memory_of_a_rank(spec: JobSpec) -> int:
    """A card's; on a CPU host a share of all there is."""
    return device_memory_bytes(spec.device) // (spec.num_gpus if spec.device == "cpu" else 1)


def must_be_cut(spec: JobSpec, folder: ModelFolder, estimate: Estimate, memory_bytes: int) -> bool:
    """Whether one card is too small for the whole model, and several together are not.

    Raises TrainingFailed for a mixture of experts that would have to be cut: its packed experts are parameters of our
    own, and were never proven to survive the cutting.
    """
    if spec.num_gpus == 1 or estimate.model_bytes <= _WEIGHTS_SHARE * memory_bytes:
        return False
    if any("experts" in name.split(".") for name, _ in folder.tensors()):
        if estimate.model_bytes <= memory_bytes:
            return False
        raise TrainingFailed(
            ErrorCode.OUT_OF_MEMORY,
            f"{spec.base_model} needs {estimate.model_bytes / 2**30:.1f} GiB for its weights, a card has "
            f"{memory_bytes / 2**30:.1f} GiB, and a mixture of experts is not cut into parts: "
            f"each of the {spec.num_gpus} cards would have to hold it whole",
            "choose a GPU with more memory or a smaller base model",
        )
    return True


def cut(model: PreTrainedModel, ranks: Ranks, device: torch.device) -> PreTrainedModel:
    """Keep this rank's part of each layer, on `device`, and everything else whole. The model may lie on the CPU.

    To be done before the adapter is attached: what is there by then is cut.
    """
    mesh = init_device_mesh(device.type, (ranks.count,))
    for layer in _layers(model):
        quantised = [module for module in layer.modules() if isinstance(module, Linear4bit)]
        facts = [(module, module.weight.compress_statistics, module.weight.quant_type) for module in quantised]
        for module in quantised:
            # bitsandbytes looks for it here when a parameter has lost it, which is what cutting does.
            module.quant_state = module.weight.quant_state
            module.quant_state.to(device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        for module, compressed, kind in facts:
            # PEFT reads these when it puts LoRA on a layer.
            module.weight.compress_statistics, module.weight.quant_type = compressed, kind
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != device.type:
            # In place, so that an embedding that is the head as well stays one.
            tensor.data = tensor.data.to(device)
    return model


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder's repeated blocks: the first list of modules that one meets."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
