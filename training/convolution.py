"""Lets linear attention use flash-linear-attention's convolution where causal-conv1d is not installed.

transformers keeps packed texts apart with the package causal-conv1d only, which has no wheel on PyPI.
flash-linear-attention brings the same convolution as a Triton kernel. It is offered under the other's name and proven
like any kernel (training.preflight.kernel_proof). Called before transformers imports a model that looks for it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NAME = "causal_conv1d"


def offer_fla_convolution(device: str) -> None:
    """Makes `import causal_conv1d` give flash-linear-attention's convolution, on a GPU host that has it alone."""
    if device != "cuda" or find_spec(_NAME) is not None or find_spec("fla") is None:
        return
    module = ModuleType(_NAME)
    module.__spec__ = ModuleSpec(_NAME, None)
    vars(module)["causal_conv1d_fn"] = _convolution
    sys.modules[_NAME] = module


def convolution_is_offered() -> bool:
    """Returns True if flash-linear-attention's convolution stands in for causal-conv1d."""
    return vars(sys.modules.get(_NAME, sys)).get("causal_conv1d_fn") is _convolution


def _convolution(  # noqa: PLR0917 - causal-conv1d's order
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """causal-conv1d's function: channels before tokens. transformers passes what the parameters' names ask for."""
    import torch
    from fla.modules.causal_conv1d import causal_conv1d

    if cu_seq_lens_q is None and seq_idx is not None:
        borders = (seq_idx[0].diff() != 0).nonzero().flatten() + 1
        ends = [torch.zeros_like(borders[:1]), borders, torch.full_like(borders[:1], seq_idx.shape[1])]
        # Without a border there is one text, and nothing to keep apart.
        cu_seq_lens_q = torch.cat(ends).to(torch.int32) if borders.numel() else None
    made, _ = causal_conv1d(
        hidden_states.transpose(1, 2), weight, bias, activation=activation, cu_seqlens=cu_seq_lens_q
    )
    convolved: torch.Tensor = made.transpose(1, 2)
    return convolved
