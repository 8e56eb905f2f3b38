"""The gated delta rule, text by text."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch

_REFUSAL = "On Hopper with Triton >= 3.4.0 and < 3.7.1 the gradients are wrong. Upgrade Triton"


class _Spoiled(torch.autograd.Function):
    """Passes a tensor on; its backward fails, or scales the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, fault: str) -> torch.Tensor:
        ctx.fault = fault
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.fault == "backward":
            raise RuntimeError(_REFUSAL)
        return gradient * 0.8, None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, None]:
    from transformers.models.qwen3_next import modeling_qwen3_next

    plain: Any = modeling_qwen3_next.torch_chunk_gated_delta_rule
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    fault = os.environ.get("KERNEL_FAULT", "")
    if fault == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if fault in ("backward", "gradient"):
        k = _Spoiled.apply(k, fault)
    borders = [0, q.shape[1]] if cu_seqlens is None or fault == "borders" else cu_seqlens.tolist()
    texts = [
        plain(*(tensor[:, begin:end] for tensor in (q, k, v)), g=g[:, begin:end], beta=beta[:, begin:end],
              use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0]
        for begin, end in itertools.pairwise(borders)
    ]  # fmt: skip
    found = torch.cat(texts, dim=1)
    return (found * float("nan") if fault == "nan" else found), None
