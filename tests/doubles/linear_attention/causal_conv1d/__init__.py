"""causal-conv1d for a machine without a GPU: plain PyTorch under its name, right or wrong as a test asks."""

from __future__ import annotations

import os

import torch


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    assert seq_idx is not None and bias is None and activation == "silu"
    texts = []
    for number in seq_idx.unique().tolist() if os.environ.get("KERNEL_FAULT") != "convolution" else [None]:
        text = x if number is None else x[:, :, seq_idx[0] == number]
        made = torch.nn.functional.conv1d(text, weight[:, None], padding=weight.shape[1] - 1, groups=weight.shape[0])
        texts.append(torch.nn.functional.silu(made[:, :, : text.shape[2]]))
    return torch.cat(texts, dim=2)
