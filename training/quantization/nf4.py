"""Packs a large weight into NF4 piece by piece, so that it never exists twice in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Iterable

import bitsandbytes.functional as bnb
import torch

BLOCK = 64
# The size of one call of the packing kernel: its temporaries on a CPU take about 16 bytes an element, and larger
# pieces are not packed faster.
PIECE_ELEMENTS = 1 << 20


def pack(
    pieces: Iterable[torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, bnb.QuantState]:
    """Packs consecutive pieces of one weight, each except the last a multiple of BLOCK elements.

    Equal, bit for bit, to bnb.quantize_4bit(whole, compress_statistics=True): blocks are quantised independently, and
    the second quantisation, of their maxima, is done once over all of them.
    """
    count = math.prod(shape)
    packed = torch.empty((-(-count // 2), 1), dtype=torch.uint8, device=device)
    maxima = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=device)
    done = 0
    for piece in pieces:
        part, state = bnb.quantize_4bit(piece.contiguous(), blocksize=BLOCK, quant_type="nf4")
        packed[done // 2 : done // 2 + part.shape[0]] = part
        maxima[done // BLOCK : done // BLOCK + state.absmax.numel()] = state.absmax
        done += piece.numel()
    if done != count:
        raise ValueError(f"a weight of shape {tuple(shape)} has {count} elements, {done} arrived")
    offset = maxima.mean()
    packed_maxima, second = bnb.quantize_blockwise(maxima - offset, blocksize=256)
    return packed, bnb.QuantState(
        absmax=packed_maxima,
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=bnb.get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=offset,
        state2=second,
    )


def pieces_of(weight: torch.Tensor) -> Iterable[torch.Tensor]:
    """Splits a weight into consecutive views of at most PIECE_ELEMENTS."""
    return torch.split(weight.reshape(-1), PIECE_ELEMENTS)
