"""Reads from a model's own mask where the texts of a packed row begin and how far back a token sees, without the mask.

A dense mask of a row with T tokens has T × T values, and attention with one computes them all. What it says is usually
short: each token sees its own text, up to itself, at most a window back. This is read from the mask's function at a few
positions for each token, so that what the model asked for decides, and not the name of its architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch

# transformers' form of a mask: (batch, head, query, key) positions to whether the query sees the key.
MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Borders:
    """The texts of a packed row. `ends` begins with 0; `window` is None if every text is shorter than it.

    `dense` builds the mask that this replaces, for attention that needs one.
    """

    ends: tuple[int, ...]
    ends_on_device: torch.Tensor
    window: int | None
    dense: Callable[[], torch.Tensor | None]
    # By the ends that layers were given, for reading them waits for the GPU. They are kept, so that no other tensor can
    # have their identity.
    _divided: dict[int, tuple[torch.Tensor, Borders]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max(end - start for start, end in pairwise(self.ends))

    def divided_at(self, ends_on_device: torch.Tensor) -> Borders:
        """Returns these borders and those that the row was packed with: an architecture's mask may not know of them."""
        if id(ends_on_device) not in self._divided:
            given = ends_on_device.tolist()
            ends = tuple(sorted({*self.ends, *given}))
            divided = self if ends == self.ends or given[-1] != self.ends[-1] else self._at(ends)
            self._divided[id(ends_on_device)] = ends_on_device, divided
        return self._divided[id(ends_on_device)][1]

    def _at(self, ends: tuple[int, ...]) -> Borders:
        device = self.ends_on_device.device
        longest = max(end - start for start, end in pairwise(ends))
        return Borders(
            ends=ends,
            ends_on_device=torch.tensor(ends, dtype=torch.int32, device=device),
            window=self.window if self.window is not None and self.window < longest else None,
            dense=partial(_divided_mask, self.dense, ends, device),
        )

    def as_mask(self) -> torch.Tensor:
        """Returns a mask for models to hand down to their attention, which finds these borders on it.

        It is empty, so that code that computes with it raises an error instead of seeing too much.
        """
        mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=self.ends_on_device.device)
        mask.borders = self  # type: ignore[attr-defined]
        return mask


def _divided_mask(
    dense: Callable[[], torch.Tensor | None], ends: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """Returns a dense mask without what crosses the borders."""
    mask = dense()
    lengths = torch.tensor([end - start for start, end in pairwise(ends)], device=device)
    text_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    together_TT = text_T[:, None] == text_T[None]
    if mask is None:
        return (together_TT & together_TT.tril())[None, None]
    return (
        mask & together_TT if mask.dtype == torch.bool else mask.masked_fill(~together_TT, torch.finfo(mask.dtype).min)
    )


def borders_on(mask: Any) -> Borders | None:
    """Returns the borders that a mask carries (`Borders.as_mask`); None for any other mask."""
    borders: Borders | None = getattr(mask, "borders", None)
    return borders


def read_borders(
    sees: MaskFunction,
    length: int,
    window: int | None,
    device: torch.device | str,
    dense: Callable[[], torch.Tensor | None],
) -> Borders | None:
    """Returns the borders that a mask's function means; None if it means more than borders and a window.

    A token that does not see its predecessor begins a text. Then each token's mask is compared with what that would
    mean at both ends of what it sees, one position beyond each of them, and at some others.
    """
    place_T = torch.arange(length, device=device)
    zero_T = torch.zeros_like(place_T)
    begins_T = ~sees(zero_T, zero_T, place_T, (place_T - 1).clamp(min=0)).expand(length)
    begins_T[0] = True
    first_T = torch.where(begins_T, place_T, 0).cummax(0).values
    if window is not None:
        first_T = torch.maximum(first_T, place_T - window + 1)
    # Neighbouring tokens look at places far apart: a pattern inside what they see would be met.
    spread_T = (place_T * 7919 + 13) % length
    within_T = first_T + spread_T % (place_T - first_T + 1)
    looked_PT = torch.stack([first_T, first_T - 1, place_T, place_T + 1, within_T, spread_T, zero_T])
    found_PT = sees(zero_T, zero_T, place_T, looked_PT.clamp(0, length - 1)).expand_as(looked_PT)
    meant_PT = (looked_PT >= first_T) & (looked_PT <= place_T)
    exists_PT = (looked_PT >= 0) & (looked_PT < length)
    agrees = ((found_PT == meant_PT) | ~exists_PT).all()
    # One transfer, because each waits for the GPU.
    agreed, *begins = torch.cat([agrees[None], begins_T]).tolist()
    if not agreed:
        return None
    ends = (*(place for place, is_first in enumerate(begins) if is_first), length)
    longest = max(end - start for start, end in pairwise(ends))
    return Borders(
        ends=ends,
        ends_on_device=torch.tensor(ends, dtype=torch.int32, device=device),
        window=window if window is not None and window < longest else None,
        dense=dense,
    )
