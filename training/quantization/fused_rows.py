"""Moves rows between tokens and their experts in one Triton kernel each way, and never writes a row twice.

Rows of tokens are (N, D); rows sorted by expert are (S, D), S = N × K, where token n's k-th row is at `back_NK`. Sums
are in float32 and always in the same order: no row is added to by two programs. Import it only where Triton is
installed.

A program has one token and, except backward, one tile of its columns: 1024 columns are 16 bytes for each thread of four
warps, the widest load there is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from training.quantization.fused_product import as_bf16

_TILE = 1024


def spread_rows(token_ND: torch.Tensor, back_NK: torch.Tensor) -> torch.Tensor:
    """Copies each token's row to its K places."""
    rows: torch.Tensor = torch.ops.brightrun.spread_rows(token_ND.contiguous(), back_NK)
    return rows


def sum_rows(rows_SD: torch.Tensor, back_NK: torch.Tensor, weight_NK: torch.Tensor | None = None) -> torch.Tensor:
    """Adds each token's K rows up, weighted."""
    weight = None if weight_NK is None else weight_NK.contiguous()
    total: torch.Tensor = torch.ops.brightrun.sum_rows(rows_SD.contiguous(), back_NK, weight)
    return total


def weighted_rows_backward(
    grad_ND: torch.Tensor, rows_SD: torch.Tensor, back_NK: torch.Tensor, weight_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `sum_rows` for its rows and its weights."""
    grads: tuple[torch.Tensor, torch.Tensor] = torch.ops.brightrun.weighted_rows_backward(
        grad_ND.contiguous(), rows_SD.contiguous(), back_NK, weight_NK.contiguous()
    )
    return grads


@torch.library.custom_op("brightrun::spread_rows", mutates_args=(), schema="(Tensor tokens, Tensor back) -> Tensor")
def _spread(tokens: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    (count, k), width = back.shape, tokens.shape[1]
    rows = tokens.new_empty(count * k, width)
    if count:
        _spread_rows[(count, triton.cdiv(width, _TILE))](tokens, back, rows, width, K=k, TILE=_TILE)
    return rows


@_spread.register_fake
def _(tokens: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    return tokens.new_empty(back.numel(), tokens.shape[1])


@torch.library.custom_op(
    "brightrun::sum_rows", mutates_args=(), schema="(Tensor rows, Tensor back, Tensor? weight) -> Tensor"
)
def _sum(rows: torch.Tensor, back: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    (count, k), width = back.shape, rows.shape[1]
    total = rows.new_empty(count, width)
    if count:
        _sum_rows[(count, triton.cdiv(width, _TILE))](
            rows,
            back,
            # Not read without weights: any pointer will do.
            back if weight is None else weight,
            total,
            width,
            K=k,
            WEIGHTED=weight is not None,
            TILE=_TILE,
            EMULATED=_is_emulated(rows),
        )
    return total


@_sum.register_fake
def _(rows: torch.Tensor, back: torch.Tensor, _weight: torch.Tensor | None) -> torch.Tensor:
    return rows.new_empty(back.shape[0], rows.shape[1])


@torch.library.custom_op(
    "brightrun::weighted_rows_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor back, Tensor weight) -> (Tensor, Tensor)",
)
def _backward(
    grad: torch.Tensor, rows: torch.Tensor, back: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    (count, k), width = back.shape, rows.shape[1]
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    if count:
        _weighted_rows_backward[(count,)](
            grad,
            rows,
            back,
            weight,
            grad_rows,
            grad_weight,
            width,
            K=k,
            TILE=_TILE,
            EMULATED=_is_emulated(rows),
            EMULATED_WEIGHT=_is_emulated(weight),
        )
    return grad_rows, grad_weight


@_backward.register_fake
def _(_grad: torch.Tensor, rows: torch.Tensor, _back: torch.Tensor, weight: torch.Tensor) -> Any:
    return torch.empty_like(rows), torch.empty_like(weight)


def _is_emulated(tensor: torch.Tensor) -> bool:
    """See `as_bf16`."""
    return tensor.dtype is torch.bfloat16 and bool(triton.knobs.runtime.interpret)


@triton.jit
def _spread_rows(  # noqa: PLR0917
    tokens: tl.tensor, back: tl.tensor, rows: tl.tensor, width: tl.tensor, K: tl.constexpr, TILE: tl.constexpr
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column_D = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column_D = column_D < width
    value_D = tl.load(tokens + token * width + column_D, mask=is_column_D)
    for k in range(K):
        row = tl.load(back + token * K + k).to(tl.int64)
        tl.store(rows + row * width + column_D, value_D, mask=is_column_D)


@triton.jit
def _sum_rows(  # noqa: PLR0917
    rows: tl.tensor,
    back: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column_D = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column_D = column_D < width
    sum_D = tl.zeros((TILE,), dtype=tl.float32)
    for k in range(K):
        row = tl.load(back + token * K + k).to(tl.int64)
        value_D = tl.load(rows + row * width + column_D, mask=is_column_D, other=0.0).to(tl.float32)
        if WEIGHTED:
            value_D = value_D * tl.load(weight + token * K + k).to(tl.float32)
        sum_D += value_D
    if EMULATED:
        sum_D = as_bf16(sum_D)
    tl.store(total + token * width + column_D, sum_D.to(total.dtype.element_ty), mask=is_column_D)


@triton.jit
def _weighted_rows_backward(  # noqa: PLR0917
    grad: tl.tensor,
    rows: tl.tensor,
    back: tl.tensor,
    weight: tl.tensor,
    grad_rows: tl.tensor,
    grad_weight: tl.tensor,
    width: tl.tensor,
    K: tl.constexpr,
    TILE: tl.constexpr,
    EMULATED: tl.constexpr,
    EMULATED_WEIGHT: tl.constexpr,
) -> None:
    """A row's gradient is the token's, times the weight; a weight's is the product of the token's and the row."""
    token = tl.program_id(0).to(tl.int64)
    for k in range(K):
        row = tl.load(back + token * K + k).to(tl.int64)
        factor = tl.load(weight + token * K + k).to(tl.float32)
        product_D = tl.zeros((TILE,), dtype=tl.float32)
        for start in range(0, width, TILE):
            column_D = start + tl.arange(0, TILE)
            is_column_D = column_D < width
            # Read anew for each k: from L1, where a token's row fits.
            grad_D = tl.load(grad + token * width + column_D, mask=is_column_D, other=0.0).to(tl.float32)
            value_D = tl.load(rows + row * width + column_D, mask=is_column_D, other=0.0).to(tl.float32)
            product_D += grad_D * value_D
            scaled_D = grad_D * factor
            if EMULATED:
                scaled_D = as_bf16(scaled_D)
            tl.store(grad_rows + row * width + column_D, scaled_D.to(grad_rows.dtype.element_ty), mask=is_column_D)
        product = tl.sum(product_D, 0)
        if EMULATED_WEIGHT:
            product = as_bf16(product)
        tl.store(grad_weight + token * K + k, product.to(grad_weight.dtype.element_ty))
