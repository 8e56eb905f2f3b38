"""Copies the trained tensors out of a model and back into it, for checkpoints."""

from __future__ import annotations

import torch


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all trained tensors, by parameter name, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def restore_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copies tensors back into the parameters of the same names. Raises KeyError if the sets of names differ."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != tensors.keys():
        raise KeyError(f"checkpoint and model differ in {sorted(parameters.keys() ^ tensors.keys())[:5]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
