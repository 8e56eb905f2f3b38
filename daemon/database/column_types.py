"""Makes values fit the app's columns: limits numbers to their digits, cleans text and JSON of what Postgres refuses.

The app owns the column types and we do not change them (that would rewrite a table in use), so a
gradient norm of 1e30 is fitted here, once, before any statement uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_INT4_MAX = 2**31 - 1


def fit_numeric(value: float | None, digits: int, scale: int) -> float | None:
    """Returns the value if it fits numeric(digits, scale), else None. NaN and infinity give None."""
    if value is None or not math.isfinite(value) or abs(value) >= _limit(digits, scale):
        return None
    return value


def clamp_numeric(value: float, digits: int, scale: int) -> float | None:
    """For NOT NULL columns: limits the value to the largest that fits. None only for NaN (skip that point)."""
    if math.isnan(value):
        return None
    largest = _limit(digits, scale) - 10.0**-scale
    return min(max(value, -largest), largest)


def fit_integer(value: int) -> int:
    """Limits the value to 0 and the largest four-byte integer."""
    return min(max(value, 0), _INT4_MAX)


def clean_text(value: str, most: int) -> str:
    """Replaces NUL bytes and lone surrogates, which Postgres refuses, and shortens the text to `most` characters.

    A long text keeps its beginning and its end, the most useful parts of a traceback."""
    cleaned = value.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
    if len(cleaned) <= most:
        return cleaned
    head = most // 4
    return cleaned[:head] + "\n[...]\n" + cleaned[head + 7 - most :]


def clean_json(value: Any) -> Any:
    """Returns a copy that jsonb accepts: NaN and infinity become null, text is cleaned, unknown objects become text."""
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
    # Half a unit of the last digit below: anything larger would be rounded up to one digit too many.
    return 10.0 ** (digits - scale) - 0.5 * 10.0**-scale
