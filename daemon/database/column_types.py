"""What the app's columns can hold: numbers fitted to their digits, text and JSON cleaned of what Postgres refuses.

The column types are the app's and stay as they are (changing one rewrites a living table), so a
gradient norm of 1e30 is fitted here, once, before any statement sees it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_INT4_MAX = 2**31 - 1


def fit_numeric(value: float | None, digits: int, scale: int) -> float | None:
    """The value if numeric(digits, scale) holds it, else None. NaN and infinity are no numbers."""
    if value is None or not math.isfinite(value) or abs(value) >= _limit(digits, scale):
        return None
    return value


def clamp_numeric(value: float, digits: int, scale: int) -> float | None:
    """As fit_numeric for a NOT NULL column: too large becomes the largest; None only for NaN (leave the point out)."""
    if math.isnan(value):
        return None
    largest = _limit(digits, scale) - 10.0**-scale
    return min(max(value, -largest), largest)


def fit_integer(value: int) -> int:
    """The value within a four-byte integer."""
    return min(max(value, 0), _INT4_MAX)


def clean_text(value: str, most: int) -> str:
    """Without NUL bytes and lone surrogates, which Postgres refuses; at most `most` characters, the end kept apart.

    A text that is too long keeps its beginning and its end: a traceback says the most there."""
    cleaned = value.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
    if len(cleaned) <= most:
        return cleaned
    head = most // 4
    return cleaned[:head] + "\n[...]\n" + cleaned[head + 7 - most :]


def clean_json(value: Any) -> Any:
    """A copy that jsonb accepts: NaN and infinity become null, text is cleaned, unknown objects become their text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean_text(value, 100_000)
    if isinstance(value, Mapping):
        return {clean_text(str(key), 1_000): clean_json(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [clean_json(item) for item in value]
    return clean_text(str(value), 100_000)


def _limit(digits: int, scale: int) -> float:
    # Half a unit of the last place below: what would round up to one digit too many is too large.
    return 10.0 ** (digits - scale) - 0.5 * 10.0**-scale
