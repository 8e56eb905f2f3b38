"""Why a row cannot be used, and how the reasons are told to a user: each once, with all the lines that have it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from training.events import ErrorCode
from training.failures import TrainingFailed

_SHOWN_FAULTS = 10
_SHOWN_RANGES = 8
# A value is quoted to be found again in the file, not to be read.
_SHOWN_CHARACTERS = 60
ONE_A_LINE = 'give one JSON object a line: {"messages": [...]}'


class BadRow(ValueError):
    """A row cannot be used; the message says why in the user's terms, and `hint` what to do if there is more to it
    than to correct or remove the row."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


class NoExample(Exception):
    """A well-formed row that is no example; the message is the reason under which it is counted."""


def invalid(message: str, hint: str) -> TrainingFailed:
    """This module's error: the dataset must change, not the service."""
    return TrainingFailed(ErrorCode.DATASET_INVALID, message, hint)


def list_faults(faults: Sequence[tuple[str, str]]) -> str:
    """Joins (place, reason) pairs into one sentence: each reason once with its places, the first ten in full."""
    places: dict[str, list[str]] = {}
    for place, reason in faults:
        places.setdefault(reason, []).append(place)
    shown = [f"{join_places(at)}: {reason}" for reason, at in list(places.items())[:_SHOWN_FAULTS]]
    more = sum(len(at) for at in list(places.values())[_SHOWN_FAULTS:])
    return "; ".join(shown) + (f"; and {more:,} more" if more else "")


def join_places(places: Iterable[str]) -> str:
    """Returns `lines 3, 5 to 9 and 12` for the places of these lines; places of another kind stand beside them."""
    numbers: dict[str, list[int]] = {}
    for place in places:
        found = re.fullmatch(r"(.*) (\d{1,12})", place)
        numbers.setdefault(found[1] if found else place, []).extend([int(found[2])] if found else [])
    parts = [_numbered(kind, found) for kind, found in list(numbers.items())[:_SHOWN_RANGES]]
    more = len(numbers) - _SHOWN_RANGES
    return ", ".join(parts) + (f" and {more:,} more" if more > 0 else "")


def _numbered(kind: str, numbers: list[int]) -> str:
    if len(numbers) < 2:
        return " ".join([kind, *(str(number) for number in numbers)])
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    parts = [_range(first, last) for first, last in ranges[:_SHOWN_RANGES]]
    more = sum(last - first + 1 for first, last in ranges[_SHOWN_RANGES:])
    if more:
        parts.append(f"{more:,} more")
    return f"{kind}s " + (f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0])


def _range(first: int, last: int) -> str:
    if first == last:
        return str(first)
    return f"{first} to {last}"


def shown(value: object) -> str:
    """Quotes a value of the file, shortened and with its unprintable characters escaped."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]!r}…"
    if isinstance(value, dict | list):
        return kind_of(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)[:_SHOWN_CHARACTERS]


def kind_of(value: Any) -> str:
    return {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }.get(type(value), type(value).__name__)
