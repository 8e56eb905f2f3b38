"""Draws a curve in one line of text: eight heights per character, as wide as there is room."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_HEIGHTS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draws the values from left to right, averaged to fit `width`; '' without any finite value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    squeezed = squeeze(finite, width)
    low, high = min(squeezed), max(squeezed)
    # Draw a flat line low, instead of stretching its noise to full height.
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    return "".join(_HEIGHTS[min(int((value - low) / span * len(_HEIGHTS)), len(_HEIGHTS) - 1)] for value in squeezed)


def squeeze(values: Sequence[float], most: int) -> list[float]:
    """Reduces the values to at most `most`, as means of neighbours in order."""
    if len(values) <= most:
        return list(values)
    bounds = [round(part * len(values) / most) for part in range(most + 1)]
    return [sum(values[left:right]) / (right - left) for left, right in itertools.pairwise(bounds)]
