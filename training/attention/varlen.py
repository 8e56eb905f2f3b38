"""Attention of a packed row by flash attention's kernel for texts of different lengths, which PyTorch brings along.

One launch for all texts of a row, nothing computed between texts, no mask, no repeated key or value heads. There is no
kernel for a CPU. `training.attention.choice` compares it with the reference on the GPU that it runs on before it is
used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from training.attention.borders import Borders

# The kernel's largest head.
_MOST_DIMENSIONS = 256
# It reads heads in pieces of this many numbers.
_PIECE = 8


def attend_varlen(
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTE: torch.Tensor,
    borders: Borders,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns each token's attention over its own text, THE. Raises ValueError for what the kernel does not know."""
    if softcap is not None:
        raise ValueError("PyTorch's kernel has no soft cap")
    if query_HTD.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the kernel computes in 16 bits, not in {query_HTD.dtype}")
    # Heads of keys and values may differ in size (multi-head latent attention); zeros change no product.
    size = -(-max(query_HTD.shape[2], value_GTE.shape[2]) // _PIECE) * _PIECE
    if size > _MOST_DIMENSIONS:
        raise ValueError(f"the kernel has heads of at most {_MOST_DIMENSIONS} numbers, not of {size}")
    query_THD, key_TGD, value_TGD = (
        functional.pad(heads.transpose(0, 1), (0, size - heads.shape[2]))
        if heads.shape[2] < size
        else heads.transpose(0, 1)
        for heads in (query_HTD, key_GTD, value_GTE)
    )
    # Left of itself a token sees one fewer than the window, which counts the token.
    window = (-1 if borders.window is None else borders.window - 1, 0)
    if sinks_H is None:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = borders.ends_on_device, borders.longest
        found: Any = varlen_attn(
            query_THD,
            key_TGD,
            value_TGD,
            ends,
            ends,
            longest,
            longest,
            scale=scale,
            window_size=window,
            enable_gqa=True,
        )
    else:
        found = _WithSinks.apply(query_THD, key_TGD, value_TGD, sinks_H, borders, scale, window)  # type: ignore[no-untyped-call]
    attended_THE: torch.Tensor = found[..., : value_GTE.shape[2]]
    return attended_THE


class _WithSinks(torch.autograd.Function):
    """A sink takes a share of each token's attention and gives nothing: the kernel's result times what is left.

    With the sink in the sum of exponentials, and the result that it leaves, the kernel's own backward is right: it
    takes every share of attention, and the mean that softmax subtracts, from these two. The sinks are frozen.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes no names
        ctx: Any,
        query_THD: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
        sinks_H: torch.Tensor,
        borders: Borders,
        scale: float,
        window: tuple[int, int],
    ) -> torch.Tensor:
        ends, longest = borders.ends_on_device, borders.longest
        plain_THD, log_sum_HT, random, *_ = torch.ops.aten._flash_attention_forward(
            query_THD, key_TGD, value_TGD, ends, ends, longest, longest, 0.0, window == (-1, 0), False,
            scale=scale, window_size_left=window[0], window_size_right=window[1],
        )  # fmt: skip
        with_sink_HT = torch.logaddexp(log_sum_HT, sinks_H.float()[:, None])
        left_TH1 = (log_sum_HT - with_sink_HT).exp().transpose(0, 1)[..., None]
        attended_THD = (plain_THD * left_TH1).to(plain_THD.dtype)
        ctx.save_for_backward(query_THD, key_TGD, value_TGD, attended_THD, with_sink_HT, random)
        ctx.borders, ctx.scale, ctx.window = borders, scale, window
        result: torch.Tensor = attended_THD
        return result

    @staticmethod
    def backward(ctx: Any, gradient_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_THD, key_TGD, value_TGD, attended_THD, with_sink_HT, random = ctx.saved_tensors
        ends, longest = ctx.borders.ends_on_device, ctx.borders.longest
        gradients = torch.ops.aten._flash_attention_backward(
            gradient_THD.contiguous(), query_THD, key_TGD, value_TGD, attended_THD, with_sink_HT, ends, ends,
            longest, longest, 0.0, ctx.window == (-1, 0), random, torch.empty(0, device=query_THD.device),
            scale=ctx.scale, window_size_left=ctx.window[0], window_size_right=ctx.window[1],
        )  # fmt: skip
        return (*gradients, None, None, None, None)
