"""Multiplies rows with the 4-bit weights of their experts, where the rows of one expert lie together.

One function with three implementations. `unpacked` unpacks all experts of a layer and calls torch's grouped product;
it is what a CPU uses. `fused` is our kernel, which unpacks while it multiplies (training.quantization.fused_product).
`reference` takes one expert at a time in float32: slow, and what the others are compared with. On a GPU the job chooses
at its start (training.quantization.choose_product).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers.integrations.moe import _grouped_mm

from training.quantization.nf4 import unpack, unpack_experts


class Kind(StrEnum):
    FUSED = "fused"
    UNPACKED = "unpacked"
    REFERENCE = "reference"


@dataclass(frozen=True)
class Implementation:
    """How a layer's experts are computed.

    `tile_rows`: how many rows of an expert the fused kernel multiplies at a time. `moves_rows`: rows are brought to the
    experts and added up by one kernel each (training.quantization.chosen_rows).
    """

    kind: Kind
    tile_rows: int = 0
    moves_rows: bool = False

    def __str__(self) -> str:
        name = f"{self.kind} by {self.tile_rows} rows" if self.tile_rows else str(self.kind)
        return f"{name}, rows moved by kernels" if self.moves_rows else name


UNPACKED = Implementation(Kind.UNPACKED)
REFERENCE = Implementation(Kind.REFERENCE)


@dataclass(frozen=True)
class Choice:
    """Which implementation to use for how many rows: (most rows, implementation), ascending."""

    by_rows: tuple[tuple[int, Implementation], ...]

    def of(self, rows: int) -> Implementation:
        return next((chosen for most, chosen in self.by_rows if rows <= most), self.by_rows[-1][1])

    def as_json(self) -> list[list[Any]]:
        return [[rows, chosen.kind.value, chosen.tile_rows, chosen.moves_rows] for rows, chosen in self.by_rows]

    @classmethod
    def from_json(cls, raw: list[list[Any]]) -> Choice:
        return cls(
            tuple((rows, Implementation(Kind(kind), height, moves_rows)) for rows, kind, height, moves_rows in raw)
        )


class Groups:
    """How rows are grouped: `ends_E`, the cumulative numbers of rows by expert, on the rows' device."""

    def __init__(self, ends_E: torch.Tensor) -> None:
        self.ends_E = ends_E
        self._tiles: dict[tuple[int, int], torch.Tensor] = {}

    def tiles(self, rows: int, tile_rows: int) -> torch.Tensor:
        """The fused kernel's list of tiles, made once for all products of a layer, forward and backward."""
        if (rows, tile_rows) not in self._tiles:
            from training.quantization.fused_product import list_tiles

            self._tiles[rows, tile_rows] = list_tiles(self.ends_E, rows, tile_rows)
        return self._tiles[rows, tile_rows]


def grouped_product(
    rows_SI: torch.Tensor,
    stored: torch.Tensor,
    state: bnb.QuantState | None,
    groups: Groups,
    implementation: Implementation,
    *,
    is_transposed: bool,
    is_held: bool,
) -> torch.Tensor:
    """Returns rows_SI @ weight of the row's expert, with a gradient for the rows.

    `state` says how to unpack the stored weight, (E, out, in) or, transposed, (E, in, out); None if it is unpacked.
    Backward keeps the stored weight, or what forward unpacked if `is_held`.
    """
    product: torch.Tensor = _GroupedProduct.apply(  # type: ignore[no-untyped-call]
        rows_SI, stored, state, groups, implementation, is_transposed, is_held
    )
    return product


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes its arguments by position
        ctx: Any,
        rows_SI: torch.Tensor,
        stored: torch.Tensor,
        state: bnb.QuantState | None,
        groups: Groups,
        implementation: Implementation,
        is_transposed: bool,
        is_held: bool,
    ) -> torch.Tensor:
        kept, kept_state = stored, state
        if implementation.kind is Kind.UNPACKED and state is not None:
            stored, state = unpack(stored, state), None
            if is_held:
                kept, kept_state = stored, None
        ctx.save_for_backward(kept)
        ctx.state, ctx.groups, ctx.implementation = kept_state, groups, implementation
        ctx.is_transposed, ctx.rows_dtype = is_transposed, rows_SI.dtype
        return multiply(rows_SI, stored, state, groups, implementation, along=not is_transposed)

    @staticmethod
    def backward(ctx: Any, grad_SO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (stored,) = ctx.saved_tensors
        grad_SI = multiply(
            grad_SO.contiguous(), stored, ctx.state, ctx.groups, ctx.implementation, along=ctx.is_transposed
        )
        return grad_SI.to(ctx.rows_dtype), *[None] * 6


def multiply(
    rows_SI: torch.Tensor,
    stored: torch.Tensor,
    state: bnb.QuantState | None,
    groups: Groups,
    implementation: Implementation,
    *,
    along: bool,
) -> torch.Tensor:
    """Multiplies with the stored matrices: `along` sums over their last axis, along which they are packed."""
    if state is not None and implementation.kind is Kind.FUSED:
        # Triton is imported by those who use it: it is not installed on every host.
        from training.quantization.fused_product import fused_product

        tiles = groups.tiles(rows_SI.shape[0], implementation.tile_rows)
        return fused_product(rows_SI, stored, state, tiles, implementation.tile_rows, along)
    if state is not None and implementation.kind is Kind.REFERENCE:
        return reference_product(rows_SI, stored, state, groups.ends_E, along=along).to(state.dtype)
    weight = stored if state is None else unpack(stored, state)
    return _grouped_mm(rows_SI, weight.transpose(-2, -1) if along else weight, groups.ends_E)


def reference_product(
    rows_SI: torch.Tensor, packed: torch.Tensor, state: bnb.QuantState, ends_E: torch.Tensor, *, along: bool
) -> torch.Tensor:
    """The same in float32, of rows and weights rounded to the compute type, expert by expert."""
    rows_SI = rows_SI.to(state.dtype)
    out_SO = torch.zeros(rows_SI.shape[0], state.shape[-2 if along else -1], dtype=torch.float32, device=rows_SI.device)
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            chosen = torch.tensor([expert], device=packed.device)
            weight = unpack_experts(packed, state, chosen)[0].float()
            out_SO[begin:end] = rows_SI[begin:end].float() @ (weight.t() if along else weight)
        begin = end
    return out_SO


def product_of_few_rows(
    rows_SI: torch.Tensor, packed: torch.Tensor, state: bnb.QuantState, expert_S: torch.Tensor, *, is_transposed: bool
) -> torch.Tensor:
    """Multiplies with the chosen experts alone: each row unpacks its own. For fewer rows than there are experts."""
    weight = unpack_experts(packed, state, expert_S)
    return torch.bmm(
        rows_SI.to(weight.dtype).unsqueeze(1), weight if is_transposed else weight.transpose(-2, -1)
    ).squeeze(1)
