"""Attention of a packed row, one text after the other: the reference on every device, and what a CPU uses.

PyTorch's own attention of each text, which needs no mask and repeats no key or value heads; with a soft cap or sinks,
which it does not know, the products are written out.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional

from training.attention.borders import Borders


def attend_text_by_text(
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTE: torch.Tensor,
    borders: Borders,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns each token's attention over its own text, THE. Query heads share key and value heads in groups."""
    lengths = [end - start for start, end in pairwise(borders.ends)]
    parts = []
    # Split, not sliced: backward of each slice would fill a tensor of the whole row with zeros.
    texts = zip(*(whole.split(lengths, dim=1) for whole in (query_HTD, key_GTD, value_GTE)), strict=True)
    for length, (query_HLD, key_GLD, value_GLE) in zip(lengths, texts, strict=True):
        window = borders.window if borders.window is not None and borders.window < length else None
        if softcap is None and sinks_H is None:
            part_HLE = functional.scaled_dot_product_attention(
                query_HLD[None],
                key_GLD[None],
                value_GLE[None],
                attn_mask=None if window is None else _visible(length, window, query_HTD.device),
                is_causal=window is None,
                scale=scale,
                enable_gqa=query_HLD.shape[0] != key_GLD.shape[0],
            )[0]
        else:
            visible_LL = _visible(length, window, query_HTD.device)
            part_HLE = _written_out(
                query_HLD, key_GLD, value_GLE, visible_LL=visible_LL, scale=scale, softcap=softcap, sinks_H=sinks_H
            )
        parts.append(part_HLE.transpose(0, 1))
    return torch.cat(parts)


def _visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    back_LL = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (back_LL >= 0) if window is None else (back_LL >= 0) & (back_LL < window)


def _written_out(
    query_HLD: torch.Tensor,
    key_GLD: torch.Tensor,
    value_GLE: torch.Tensor,
    *,
    visible_LL: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one text, HLE, with its scores in memory: `visible_LL` is True where a token sees another."""
    heads, length, _ = query_HLD.shape
    groups = key_GLD.shape[0]
    # The query heads of a group are laid one after the other: they meet their key head in one product.
    scores_GRL = (query_HLD.reshape(groups, -1, query_HLD.shape[2]) @ key_GLD.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores_GRL = softcap * torch.tanh(scores_GRL / softcap)
    scores_HLL = scores_GRL.reshape(heads, length, length).masked_fill(~visible_LL, -torch.inf)
    if sinks_H is None:
        shares_HLL = scores_HLL.softmax(dim=-1)
    else:
        # A sink takes part in the softmax and has no value.
        sinks_HL1 = sinks_H.float()[:, None, None].expand(heads, length, 1)
        shares_HLL = torch.cat([scores_HLL, sinks_HL1], dim=-1).softmax(dim=-1)[..., :-1]
    shares_GRL = shares_HLL.to(value_GLE.dtype).reshape(groups, -1, length)
    return (shares_GRL @ value_GLE).reshape(heads, length, value_GLE.shape[2])
