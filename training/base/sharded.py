"""Shards a base model that does not fit on one GPU across all GPUs (FSDP2), gathering one layer at a time.

FSDP-QLoRA with PyTorch's own `fully_shard` (FSDP2), around the frozen weights only. Each decoder layer's packed 4-bit
weights are cut into one part per rank; before a layer computes, forward or backward, its parts are gathered, and freed
afterwards. (bitsandbytes' `quant_storage` is for FSDP1, which flattens a layer's weights into one type; FSDP2 cuts each
parameter by itself, bytes as well as floats.) The adapter is not cut: it is small and trained as on one GPU, so
checkpoints, gradients and the adapter's file are the same with and without sharding. Embeddings and head stay whole on
each GPU.

The cost: each micro-batch moves the model between the GPUs twice, or three times if activations are recomputed. A
micro-batch that does not fit cannot be repeated in halves, since the other ranks would wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from bitsandbytes.nn import Linear4bit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from training.base.dtype import device_memory
from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.free_memory import Memory
from training.files.model_folder import ModelFolder
from training.preflight.estimate import Estimate
from training.ranks import Ranks
from training.spec import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The share of a GPU's memory that frozen weights may take; the rest is for adapter, activations and unpacked layers.
_WEIGHTS_SHARE = 0.75


def memory_of_a_rank(spec: JobSpec, estimate: Estimate) -> Memory:
    """Returns a GPU's memory; on a CPU host this rank's share of the total."""
    return device_memory(spec.device, estimate.model_bytes).shared_by(spec.num_gpus if spec.device == "cpu" else 1)


def must_be_cut(spec: JobSpec, folder: ModelFolder, estimate: Estimate, memory_bytes: int) -> bool:
    """Returns True if the whole model is too large for one GPU but fits on all of them together.

    `memory_bytes` is a GPU's whole memory: what is free of it differs between ranks, which must agree.
    Raises TrainingFailed for a mixture of experts that would have to be cut: its packed experts are our own parameters,
    and cutting them has never been tested.
    """
    if spec.num_gpus == 1 or estimate.model_bytes <= _WEIGHTS_SHARE * memory_bytes:
        return False
    if any("experts" in name.split(".") for name, _ in folder.tensors()):
        if estimate.model_bytes <= memory_bytes:
            return False
        raise TrainingFailed(
            ErrorCode.OUT_OF_MEMORY,
            f"{spec.base_model} needs {estimate.model_bytes / 2**30:.1f} GiB for its weights, a GPU has "
            f"{memory_bytes / 2**30:.1f} GiB, and a mixture of experts cannot be sharded: "
            f"each of the {spec.num_gpus} GPUs would have to hold all of it",
            "choose a GPU with more memory or a smaller base model",
        )
    return True


def cut(model: PreTrainedModel, ranks: Ranks, device: torch.device) -> PreTrainedModel:
    """Keeps this rank's part of each layer on `device`, and everything else whole. The model may be on the CPU.

    Call it before attaching the adapter: everything that is in a layer by then is cut.
    """
    mesh = init_device_mesh(device.type, (ranks.count,))
    for layer in _layers(model):
        quantised = [module for module in layer.modules() if isinstance(module, Linear4bit)]
        facts = [(module, module.weight.compress_statistics, module.weight.quant_type) for module in quantised]
        for module in quantised:
            # bitsandbytes looks for it here when the parameter has lost it, which happens when it is cut.
            module.quant_state = module.weight.quant_state
            module.quant_state.to(device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        for module, compressed, kind in facts:
            # PEFT reads these when it adds LoRA to a layer.
            module.weight.compress_statistics, module.weight.quant_type = compressed, kind
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != device.type:
            # In place, so that an embedding tied to the head stays tied.
            tensor.data = tensor.data.to(device)
    return model


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Returns the decoder's repeated blocks: the first list of modules found."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
