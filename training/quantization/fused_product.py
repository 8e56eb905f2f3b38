"""The experts' product as one Triton kernel: it unpacks NF4 while it multiplies, and no 16-bit weight is in memory.

For compute capability 8.0 and newer. Nothing waits for the host: which expert a tile of rows belongs to is found on the
GPU, and the number of programs is a bound from the shapes alone. Import it only where Triton is installed.

What the code assumes of the hardware:
- A program multiplies one tile of one expert's rows. Unpacking takes about nine instructions a weight (counted in the
  machine code for sm_90), the tensor cores one cycle for 32 weights and 64 rows: as few tiles of an expert as possible
  should unpack it, so a tile has about as many rows as an expert has on average (`tile_rows_for`).
- The weight is the left operand: wgmma (sm_90) takes the left one from registers, where it was unpacked, and the right
  one, the rows, from shared memory, in steps of 8 rows; its left side must be 64 high. mma (sm_80) does not mind.
- The 16 values of NF4 are looked up in shared memory: 16 words in 16 banks, so that a warp's lookup never conflicts.
  Selecting them by arithmetic takes 15 instructions, and a table of bf16 would round twice.
- Neighbouring programs share L2: they go through GROUP tiles of rows for one tile of the weight, then the next tile of
  it. For many small experts both stay there; for large ones the packed weight is read once for every GROUP tiles.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl

from training.quantization.nf4 import BLOCK

# One tile's columns of the result and its part of the sum. 128 × 64 packed weights are 4 KB: with the rows beside them,
# three stages of loading fit into 100 KB of shared memory (sm_86, sm_89) for every number of rows below.
_TILE_OUT, _TILE_SUM, _STAGES, _GROUP = 128, 64, 3, 8
# 16 is the least that tl.dot takes. More than 128 rows need more registers than a thread has.
TILE_ROWS = (16, 32, 64, 128)
# One absmax's own block (bitsandbytes' `compress_statistics`).
_NESTED_BLOCK = 256


def why_not_fused(state: bnb.QuantState) -> str | None:
    """Explains why the kernel cannot read this weight; None if it can."""
    if not state.nested or state.blocksize != BLOCK or state.state2.blocksize != _NESTED_BLOCK:
        return "its absmax is not in blocks of 64 with a second quantisation in blocks of 256"
    if state.shape[-1] % BLOCK:
        return f"its rows of {state.shape[-1]} are not whole blocks of {BLOCK}"
    # Blocks are numbered in 32 bits.
    return None if state.shape.numel() // BLOCK < 2**31 else f"it has {state.shape.numel()} elements"


def tile_rows_for(rows: int, experts: int) -> tuple[int, ...]:
    """Returns the heights worth trying: just below and just above what an expert has on average."""
    average = rows / max(1, experts)
    below = max((height for height in TILE_ROWS if height <= average), default=TILE_ROWS[0])
    above = min((height for height in TILE_ROWS if height >= average), default=TILE_ROWS[-1])
    return (below,) if below == above else (below, above)


# Operators of torch, so that whoever watches torch's operations (benchmarks/count_traffic.py, a profiler) sees them.
@torch.library.custom_op(
    "brightrun::list_tiles", mutates_args=(), schema="(Tensor ends, int rows, int tile_rows) -> Tensor"
)
def list_tiles(ends_E: torch.Tensor, rows: int, tile_rows: int) -> torch.Tensor:
    """Cuts the rows into tiles of one expert each: (tiles, 3) with the expert, its first row and the end of its rows.

    `ends_E` are the cumulative numbers of rows. As many tiles as there could be; those that are not needed say -1.
    """
    experts = ends_E.numel()
    tiles_T3 = torch.empty(_most_tiles(experts, rows, tile_rows), 3, dtype=torch.int32, device=ends_E.device)
    if rows:
        _list_tiles[(triton.cdiv(tiles_T3.shape[0], 16),)](
            ends_E,
            tiles_T3,
            experts,
            tiles_T3.shape[0],
            TILE_ROWS=tile_rows,
            EXPERTS=triton.next_power_of_2(experts),
            TILES=16,
        )
    return tiles_T3


@list_tiles.register_fake
def _(ends_E: torch.Tensor, rows: int, tile_rows: int) -> torch.Tensor:
    return torch.empty(_most_tiles(ends_E.numel(), rows, tile_rows), 3, dtype=torch.int32, device=ends_E.device)


def _most_tiles(experts: int, rows: int, tile_rows: int) -> int:
    """Each expert with any rows has at most one tile that is not full."""
    return rows // tile_rows + min(experts, rows)


def fused_product(  # noqa: PLR0917
    rows_SI: torch.Tensor,
    packed: torch.Tensor,
    state: bnb.QuantState,
    tiles_T3: torch.Tensor,
    tile_rows: int,
    along: bool,
) -> torch.Tensor:
    """Multiplies each row with its expert's matrix as stored, (A, B), or its transpose. Sums in float32.

    `along`: sums over B, the axis along which the weight is packed, and returns A columns; otherwise the reverse.
    """
    product: torch.Tensor = torch.ops.brightrun.nf4_grouped_product(
        rows_SI.to(state.dtype).contiguous(),
        packed,
        state.absmax,
        state.state2.code,
        state.state2.absmax,
        state.offset,
        state.code,
        tiles_T3,
        state.shape[-2],
        state.shape[-1],
        tile_rows,
        along,
    )
    return product


@torch.library.custom_op(
    "brightrun::nf4_grouped_product",
    mutates_args=(),
    schema="(Tensor rows, Tensor packed, Tensor maxima, Tensor maxima_code, Tensor maxima_scale, Tensor maxima_offset, "
    "Tensor table, Tensor tiles, int size_a, int size_b, int tile_rows, bool along) -> Tensor",
)
def _multiply(  # noqa: PLR0917 - an operator's arguments come by position
    rows: torch.Tensor,
    packed: torch.Tensor,
    maxima: torch.Tensor,
    maxima_code: torch.Tensor,
    maxima_scale: torch.Tensor,
    maxima_offset: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    size_a: int,
    size_b: int,
    tile_rows: int,
    along: bool,
) -> torch.Tensor:
    size_out, size_sum = (size_a, size_b) if along else (size_b, size_a)
    out = torch.empty(rows.shape[0], size_out, dtype=rows.dtype, device=rows.device)
    if rows.shape[0]:
        _product[(tiles.shape[0] * triton.cdiv(size_out, _TILE_OUT),)](
            rows,
            packed,
            maxima,
            maxima_code,
            maxima_scale,
            maxima_offset,
            table,
            tiles,
            out,
            size_a,
            size_b,
            tiles.shape[0],
            ALONG=along,
            EVEN=size_out % _TILE_OUT == 0 and size_sum % _TILE_SUM == 0,
            TILE_ROWS=tile_rows,
            TILE_OUT=_TILE_OUT,
            TILE_SUM=_TILE_SUM,
            GROUP=_GROUP,
            EMULATED=rows.dtype is torch.bfloat16 and triton.knobs.runtime.interpret,
            num_warps=warps_for(tile_rows),
            num_stages=_STAGES,
        )
    return out


@_multiply.register_fake
def _(rows: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *_, size_a, size_b, _tile_rows, along = arguments
    return rows.new_empty(rows.shape[0], size_a if along else size_b)


def warps_for(tile_rows: int) -> int:
    """128 × 128 sums in float32 are 128 registers for each thread of four warps, half of all it has: take eight."""
    return 8 if tile_rows == TILE_ROWS[-1] else 4


@triton.jit(do_not_specialize=["num_experts", "num_tiles"])
def _list_tiles(  # noqa: PLR0917
    ends: tl.tensor,
    tiles: tl.tensor,
    num_experts: tl.tensor,
    num_tiles: tl.tensor,
    TILE_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Writes TILES entries of the list. Every program adds up all experts' tiles anew, which are a few hundred."""
    expert_E = tl.arange(0, EXPERTS)
    is_expert_E = expert_E < num_experts
    end_E = tl.load(ends + expert_E, mask=is_expert_E, other=0)
    begin_E = tl.load(ends + expert_E - 1, mask=is_expert_E & (expert_E > 0), other=0)
    count_E = tl.where(is_expert_E, (end_E - begin_E + TILE_ROWS - 1) // TILE_ROWS, 0)
    tiles_until_E = tl.cumsum(count_E, 0)
    tile_T = tl.program_id(0) * TILES + tl.arange(0, TILES)
    is_before_TE = tiles_until_E[None, :] <= tile_T[:, None]
    # The experts whose tiles all come before this one. Behind the last tile these are all.
    expert_T = tl.sum(is_before_TE.to(tl.int32), 1)
    first_tile_T = tl.max(tl.where(is_before_TE, tiles_until_E[None, :], 0), 1)
    is_used_T = expert_T < num_experts
    begin_T = tl.load(ends + expert_T - 1, mask=is_used_T & (expert_T > 0), other=0)
    end_T = tl.load(ends + expert_T, mask=is_used_T, other=0)
    is_tile_T = tile_T < num_tiles
    tl.store(tiles + 3 * tile_T, tl.where(is_used_T, expert_T, -1), mask=is_tile_T)
    tl.store(tiles + 3 * tile_T + 1, begin_T + (tile_T - first_tile_T) * TILE_ROWS, mask=is_tile_T)
    tl.store(tiles + 3 * tile_T + 2, end_T, mask=is_tile_T)


@triton.jit
def as_bf16(value: tl.tensor) -> tl.tensor:
    """Float32 rounded to the nearest bf16, ties to even, by its bits."""
    bits = value.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_tiles"])
def _product(  # noqa: PLR0917, PLR0915 - a kernel has its arguments by position, and is one function
    rows: tl.tensor,
    packed: tl.tensor,
    maxima: tl.tensor,
    maxima_code: tl.tensor,
    maxima_scale: tl.tensor,
    maxima_offset: tl.tensor,
    table: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    size_a: tl.tensor,
    size_b: tl.tensor,
    num_tiles: tl.tensor,
    ALONG: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_SUM: tl.constexpr,
    GROUP: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """One tile of rows times one tile of columns. EVEN: both sizes are whole tiles, and no load needs a mask.

    EMULATED: Triton's interpreter multiplies the bits of bf16 as integers and cuts off where a GPU rounds. There, bf16
    is float32 with the same values.
    """
    TILE_A: tl.constexpr = TILE_OUT if ALONG else TILE_SUM
    TILE_B: tl.constexpr = TILE_SUM if ALONG else TILE_OUT
    size_out = size_a if ALONG else size_b
    size_sum = size_b if ALONG else size_a

    program = tl.program_id(0)
    programs_of_group = GROUP * tl.cdiv(size_out, TILE_OUT)
    first_tile = program // programs_of_group * GROUP
    tiles_of_group = tl.minimum(num_tiles - first_tile, GROUP)
    tile = first_tile + program % programs_of_group % tiles_of_group
    out_0 = program % programs_of_group // tiles_of_group * TILE_OUT
    expert = tl.load(tiles + 3 * tile)
    if expert < 0:
        return
    end = tl.load(tiles + 3 * tile + 2)
    row_R = tl.load(tiles + 3 * tile + 1) + tl.arange(0, TILE_ROWS)
    # Behind the last row the last one is read again: what it gives is not stored.
    read_R = tl.minimum(row_R, end - 1)

    # An expert begins in 64 bits: a layer's weights pass 2**31 elements. Inside an expert 32 bits are enough.
    blocks_of_b = size_b // 64
    block_0 = expert * (size_a * blocks_of_b)
    packed += block_0.to(tl.int64) * 32
    a_A = tl.arange(0, TILE_A) + (out_0 if ALONG else 0)
    byte_B = tl.arange(0, TILE_B // 2) + (0 if ALONG else out_0 // 2)
    block_B = tl.arange(0, TILE_B // 64) + (0 if ALONG else out_0 // 64)
    sum_K = tl.arange(0, TILE_SUM)
    rows_KR = rows + read_R[None, :].to(tl.int64) * size_sum + sum_K[:, None]
    values = tl.load(table + tl.arange(0, 16))
    offset = tl.load(maxima_offset)

    total_OR = tl.zeros((TILE_OUT, TILE_ROWS), dtype=tl.float32)
    for k in range(0, size_sum, TILE_SUM):
        a = a_A + (0 if ALONG else k)
        byte = byte_B + (k // 2 if ALONG else 0)
        block = block_B + (k // 64 if ALONG else 0)
        at_byte = a[:, None] * (size_b // 2) + byte[None, :]
        at_block = block_0 + a[:, None] * blocks_of_b + block[None, :]
        if EVEN:
            packed_AB = tl.load(packed + at_byte)
            maximum_AB = tl.load(maxima + at_block)
            scale_AB = tl.load(maxima_scale + at_block // 256)
            right_KR = tl.load(rows_KR + k)
        else:
            is_a = a < size_a
            is_block = is_a[:, None] & (block < blocks_of_b)[None, :]
            packed_AB = tl.load(packed + at_byte, mask=is_a[:, None] & (byte < size_b // 2)[None, :], other=0)
            maximum_AB = tl.load(maxima + at_block, mask=is_block, other=0)
            scale_AB = tl.load(maxima_scale + at_block // 256, mask=is_block, other=0.0)
            right_KR = tl.load(rows_KR + k, mask=(k + sum_K < size_sum)[:, None], other=0.0)
        absmax_AB = tl.load(maxima_code + maximum_AB.to(tl.int32)) * scale_AB + offset
        # The first of two values is in the upper half of the byte.
        codes = tl.reshape(tl.join(packed_AB >> 4, packed_AB & 0xF), [TILE_A * TILE_B])
        found = tl.reshape(tl.gather(values, codes.to(tl.int32), 0), [TILE_A, TILE_B // 64, 64])
        weight_AB = tl.reshape(found * absmax_AB[:, :, None], [TILE_A, TILE_B])
        # Rounded to the compute type before the product, as an unpacked weight is.
        if EMULATED:
            weight_AB, right_KR = as_bf16(weight_AB), right_KR.to(tl.float32)
        else:
            weight_AB = weight_AB.to(rows.dtype.element_ty)
        left_OK = weight_AB if ALONG else tl.trans(weight_AB)
        total_OR = tl.dot(left_OK, right_KR, total_OR, input_precision="ieee")

    if EMULATED:
        total_OR = as_bf16(total_OR)
    out_O = out_0 + tl.arange(0, TILE_OUT)
    tl.store(
        out + row_R[:, None].to(tl.int64) * size_out + out_O[None, :],
        tl.trans(total_OR).to(out.dtype.element_ty),
        mask=(row_R < end)[:, None] & (out_O < size_out)[None, :],
    )
