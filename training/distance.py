"""How far numbers are from what they should be: for every proof that one way of computing gives what another gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the difference, as a share of `wanted`. NaN if either contains NaN; NaN never counts as close."""
    return float((found - wanted).norm() / wanted.norm())
