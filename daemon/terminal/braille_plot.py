"""Draws a loss curve in braille dots, eight per character, so that a small panel shows a real line."""

from __future__ import annotations

from collections.abc import Sequence

# Bit of each dot in a braille character, by column (0, 1) and row (0 top … 3), as Unicode numbers them.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800


def draw_curve(values: Sequence[float], *, width: int, height: int, low: float, high: float, of: int) -> list[str]:
    """Draws `values` from left to right in `height` lines of `width` characters; `of` values fill the width.

    Values outside `low`–`high` are drawn at the border; consecutive values are joined.
    """
    columns, rows = width * 2, height * 4
    cells = [[0] * width for _ in range(height)]
    span = max(high - low, 1e-9)

    def place(index: float, value: float) -> tuple[int, int]:
        x = round(index / max(of - 1, 1) * (columns - 1))
        y = round((high - min(max(value, low), high)) / span * (rows - 1))
        return min(x, columns - 1), y

    previous: tuple[int, int] | None = None
    for index, value in enumerate(values):
        x, y = place(index, value)
        from_x, from_y = previous or (x, y)
        dots = max(abs(x - from_x), abs(y - from_y), 1)
        for part in range(dots + 1):
            dot_x = round(from_x + (x - from_x) * part / dots)
            dot_y = round(from_y + (y - from_y) * part / dots)
            cells[dot_y // 4][dot_x // 2] |= _DOTS[dot_x % 2][dot_y % 4]
        previous = (x, y)
    return ["".join(chr(_BLANK + cell) for cell in line) for line in cells]
