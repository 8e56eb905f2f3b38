"""The tensors that are trained, copied out of a model and back into it: what checkpoints hold."""

from __future__ import annotations

import torch


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that is trained, by parameter name, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def restore_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors back into the parameters of the same names. Raises KeyError when the sets differ."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != tensors.keys():
        raise KeyError(f"checkpoint and model differ in {sorted(parameters.keys() ^ tensors.keys())[:5]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
