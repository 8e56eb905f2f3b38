"""Why a row cannot be used, and how the reasons are told to a user."""

from __future__ import annotations

from training.events import ErrorCode
from training.failures import TrainingFailed

_SHOWN_FAULTS = 10
ONE_A_LINE = 'give one JSON object a line: {"messages": [...]}'


class BadRow(ValueError):
    """A row cannot be used; the message says why in the user's terms."""


class NoExample(Exception):
    """A well-formed row that is no example; the message is the reason under which it is counted."""


def invalid(message: str, hint: str) -> TrainingFailed:
    """This module's error: the dataset must change, not the service."""
    return TrainingFailed(ErrorCode.DATASET_INVALID, message, hint)


def list_faults(faults: list[tuple[str, str]]) -> str:
    """Joins (place, reason) pairs into one sentence, with the first ten in full."""
    shown = "; ".join(f"{place}: {reason}" for place, reason in faults[:_SHOWN_FAULTS])
    more = len(faults) - _SHOWN_FAULTS
    return shown + (f"; and {more} more" if more > 0 else "")
