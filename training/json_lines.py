"""Speaks to the process that started this one in JSON lines, on the stdout that it was given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

Say = Callable[[dict[str, Any]], None]


def own_stdout() -> Say:
    """Keeps stdout for our lines: what libraries print goes to stderr."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        ours.write(json.dumps(line) + "\n")
        ours.flush()

    return say
