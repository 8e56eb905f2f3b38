"""What a user should know about a dataset that can be trained on; each becomes a notice event and a line of `check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from training.data.formats.faults import shown
from training.data.formats.read_dataset import Reading
from training.data.formats.row_keys import Repeated

_SHOWN_KEYS = 12
_REPEATED: dict[Repeated, str] = {
    "question": "the history of {} pairs ends with current_user_input: the question is asked only once",
    "answer": "the history of {} pairs ends with the target: the answer is left out of the history",
    "system": "the history of {} pairs begins with system_prompt: it is given only once",
}


@dataclass(frozen=True)
class Remark:
    """Something about the data that the user should know; it becomes a notice event."""

    code: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


def remarks_on(reading: Reading) -> list[Remark]:
    """Returns what can be said of a file without a model."""
    remarks = []
    if reading.skipped:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(reading.skipped.items()))
        remarks.append(
            Remark(
                "rows_without_example",
                f"these rows are not examples and were skipped: {reasons}",
                dict(reading.skipped),
            )
        )
    if reading.repeated:
        found = "; ".join(_REPEATED[what].format(count) for what, count in reading.repeated.items())
        remarks.append(
            Remark("repeated_in_history", found, {str(what): count for what, count in reading.repeated.items()})
        )
    if reading.unused_keys:
        common = sorted(reading.unused_keys.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{_name(key)} ({count:,} ×)" for key, count in common[:_SHOWN_KEYS])
        more = len(common) - _SHOWN_KEYS
        remarks.append(
            Remark(
                "unused_keys",
                f"these keys of the dataset mean nothing here and are not trained on: {named}"
                + (f" and {more:,} more" if more > 0 else ""),
                {_name(key): count for key, count in common[:_SHOWN_KEYS]},
            )
        )
    if reading.unanswered:
        remarks.append(
            Remark(
                "unanswered_messages",
                f"{reading.unanswered:,} of {len(reading.conversations):,} conversations "
                f"{'ends' if reading.unanswered == 1 else 'end'} with a user's message; "
                "it has no answer to learn from and is not used",
                {"conversations": reading.unanswered},
            )
        )
    if reading.excluded_answers:
        remarks.append(
            Remark(
                "excluded_answers",
                f"{counted(reading.excluded_answers, 'answer')} marked in the dataset not to be trained on",
                {"answers": reading.excluded_answers},
            )
        )
    copies = len(reading.conversations) - len({conversation.key() for conversation in reading.conversations})
    if copies:
        remarks.append(
            Remark(
                "duplicate_conversations",
                f"{copies} of {len(reading.conversations)} conversations are exact copies of others; they are kept",
                {"copies": copies},
            )
        )
    return remarks


def counted(number: int, what: str) -> str:
    """Returns `1 answer is`, `2 answers are`."""
    return f"{number:,} {what} is" if number == 1 else f"{number:,} {what}s are"


def _name(key: str) -> str:
    """A key as it can be written and shown: it may be of any length and hold anything."""
    return key if key.isprintable() and len(key) <= 60 else shown(key)
