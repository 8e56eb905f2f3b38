"""Packs a large weight into NF4 piece by piece, so that it never exists twice in 16 bits, and unpacks any size."""

from __future__ import annotations

import math
from collections.abc import Iterable

import bitsandbytes.functional as bnb
import torch

BLOCK = 64
# The size of one call of the packing kernel: its temporaries on a CPU take about 16 bytes an element, and larger
# pieces are not packed faster.
PIECE_ELEMENTS = 1 << 20
# The second quantisation, of the blocks' maxima.
_NESTED_BLOCK = 256
# bitsandbytes counts elements in 32 bits and its kernels round the count up; the experts of one layer of DeepSeek-V3
# have 7.5 billion. Larger weights are unpacked in parts, each a multiple of BLOCK.
MOST_ELEMENTS = (1 << 31) - (1 << 20)
_PART_ELEMENTS = 1 << 28


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
    packed_maxima, second = bnb.quantize_blockwise(maxima - offset, blocksize=_NESTED_BLOCK)
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


def unpack(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Unpacks a weight, a large one in several calls. Equal, bit for bit, to bnb.dequantize_4bit(packed, state)."""
    count = math.prod(state.shape)
    if count <= MOST_ELEMENTS:
        at_once: torch.Tensor = bnb.dequantize_4bit(packed, state)
        return at_once
    maxima = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
    whole = torch.empty(count, dtype=state.dtype, device=packed.device)
    for start in range(0, count, _PART_ELEMENTS):
        part = whole[start : start + _PART_ELEMENTS]
        stop = start + part.numel()
        its_state = bnb.QuantState(
            absmax=maxima[start // BLOCK : -(-stop // BLOCK)],
            shape=part.shape,
            dtype=state.dtype,
            blocksize=BLOCK,
            code=state.code,
            quant_type=state.quant_type,
        )
        # On a CPU the kernel adds an axis to a shape that has one.
        part.copy_(bnb.dequantize_4bit(packed[start // 2 : -(-stop // 2)], its_state).view(-1))
    return whole.view(state.shape)


def pieces_of(weight: torch.Tensor) -> Iterable[torch.Tensor]:
    """Splits a weight into consecutive views of at most PIECE_ELEMENTS."""
    return torch.split(weight.reshape(-1), PIECE_ELEMENTS)


def fills_blocks(shape: torch.Size) -> bool:
    """Returns True if no block holds weights of two experts, for a weight of shape (E, …)."""
    return math.prod(shape[1:]) % BLOCK == 0


def unpack_experts(packed: torch.Tensor, state: bnb.QuantState, expert_N: torch.Tensor) -> torch.Tensor:
    """Unpacks these experts of a weight alone, (N, …): the same bits as in the whole unpacked weight.

    An expert's bytes and blocks are contiguous (`fills_blocks`). Nothing waits for the host.
    """
    experts, blocks = state.shape[0], math.prod(state.shape[1:]) // BLOCK
    block_NB = expert_N.unsqueeze(1) * blocks + torch.arange(blocks, device=expert_N.device)
    # In the order of bnb.dequantize_blockwise and the sum after it, which rounds twice.
    maximum_NB = state.state2.code[state.absmax[block_NB].int()] * state.state2.absmax[block_NB // _NESTED_BLOCK]
    unpacked: torch.Tensor = bnb.dequantize_4bit(
        packed.view(experts, -1)[expert_N].view(-1, 1),
        bnb.QuantState(
            absmax=(maximum_NB + state.offset).view(-1),
            shape=torch.Size((expert_N.numel(), *state.shape[1:])),
            dtype=state.dtype,
            blocksize=BLOCK,
            code=state.code,
            quant_type=state.quant_type,
        ),
    )
    return unpacked
