"""Whether an answer is an adapter's, and not that of the base model under another name."""

from __future__ import annotations

import math

from daemon.serving.endpoint_api import Answer

# Two equal questions differ by the server's rounding, which is measured beside them; an adapter by more than this.
SMALLEST_GAP = 0.005
TIMES_THE_NOISE = 4.0


def differs(base: Answer, base_again: Answer, adapter: Answer) -> bool:
    """Whether the adapter answers otherwise than the base does, by more than the base from itself."""
    noise, found = gap(base, base_again), gap(base, adapter)
    if noise is None or found is None:
        return base.text == base_again.text and adapter.text != base.text
    return found > max(SMALLEST_GAP, TIMES_THE_NOISE * noise)


def gap(one: Answer, other: Answer) -> float | None:
    """The largest difference of a token's logarithmic probability; infinite if the tokens differ. None: not told."""
    if one.tokens is None or other.tokens is None:
        return None
    if [token for token, _ in one.tokens] != [token for token, _ in other.tokens]:
        return math.inf
    return max(abs(left - right) for (_, left), (_, right) in zip(one.tokens, other.tokens, strict=True))
