"""A curve in one line of text: eight heights a character, as wide as there is room."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_HEIGHTS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values from left to right, squeezed to `width` by their means; '' without any finite value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    squeezed = squeeze(finite, width)
    low, high = min(squeezed), max(squeezed)
    # A flat line is drawn low, not as noise blown up to full height.
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    return "".join(_HEIGHTS[min(int((value - low) / span * len(_HEIGHTS)), len(_HEIGHTS) - 1)] for value in squeezed)


def squeeze(values: Sequence[float], most: int) -> list[float]:
    """At most `most` values: means of neighbours, in their order."""
    if len(values) <= most:
        return list(values)
    bounds = [round(part * len(values) / most) for part in range(most + 1)]
    return [sum(values[left:right]) / (right - left) for left, right in itertools.pairwise(bounds)]
