"""Reads conversations from a dataset file: detects the format, and reports every unusable line with its reason.

Four formats are read (see docs/how-to/datasets.md). They are detected by content, because a file's name says nothing
reliable about it. A malformed line fails the job, and the message lists the first such lines: the system before this
one dropped lines silently and trained on nothing. Lines that are well formed but no example (a `_meta` header, a pair
whose target_response is null) are counted and reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data.formats.conversation import Conversation, Turn
from training.data.formats.faults import ONE_A_LINE, BadRow, NoExample, invalid, kind_of, list_faults, shown
from training.data.formats.file_text import read_text
from training.data.formats.pairs import read_pair
from training.data.formats.row_keys import Notes, Repeated, check_row_keys
from training.data.formats.rows import NotJson, Unreadable, id_of, rows_of
from training.data.formats.turns import check_turns, read_list
from training.data.formats.unsupported import refuse_known

_SHOWN_KEYS = 8
_SHOWN_HINTS = 3


@dataclass(frozen=True)
class Reading:
    """The content of a file. `skipped` counts lines that are no example, by reason.

    `unused_keys` counts rows by a key that means nothing here; `unanswered` the conversations that end with words of
    the user's, which are not used; `excluded_answers` those that are marked not to be trained on; `repeated`
    the pairs whose history repeated something of their own, by what it was."""

    format: str
    conversations: tuple[Conversation, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    unused_keys: Mapping[str, int] = field(default_factory=dict)
    unanswered: int = 0
    excluded_answers: int = 0
    repeated: Mapping[Repeated, int] = field(default_factory=dict)


def read_conversations(path: Path) -> Reading:
    """Reads a dataset in any of the four formats. Raises TrainingFailed(dataset_invalid) naming lines and reasons."""
    return _read_rows(rows_of(read_text(path)))


def _read_rows(rows: Iterator[tuple[str, Any]]) -> Reading:
    conversations: list[Conversation] = []
    faults: list[tuple[str, str]] = []
    hints: dict[str | None, None] = {}
    skipped: Counter[str] = Counter()
    notes = Notes()
    file_format: str | None = None
    any_json = False
    for place, row in rows:
        any_json = any_json or not isinstance(row, NotJson)
        try:
            name, reader = _reader_of(row)
            if file_format is None:
                file_format = name
            elif name != file_format:
                raise BadRow(f"is a row of the format {name}, but the file began as {file_format}")
            check_row_keys(row, name, notes)
            conversations.append(Conversation(reader(row, notes), place, id_of(row)))
        except NoExample as reason:
            skipped[str(reason)] += 1
        except BadRow as error:
            faults.append((place, str(error)))
            hints[error.hint] = None
    if faults:
        raise invalid(_count_faults(faults, some_are_good=bool(conversations)), _advice(list(hints), any_json))
    if not conversations:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "no rows"
        raise invalid(f"the dataset holds no example ({reasons})", "add at least one conversation with an answer")
    return Reading(
        file_format or "messages",
        tuple(conversations),
        dict(skipped),
        dict(notes.unused_keys),
        notes.unanswered,
        notes.excluded_answers,
        dict(notes.repeated),
    )


def _count_faults(faults: list[tuple[str, str]], *, some_are_good: bool) -> str:
    reasons = {reason for _, reason in faults}
    if len(faults) > 1 and len(reasons) == 1 and not some_are_good:
        return f"none of the {len(faults):,} rows of the dataset can be used: {reasons.pop()}"
    count = "1 row" if len(faults) == 1 else f"{len(faults):,} rows"
    return f"{count} of the dataset cannot be used: {list_faults(faults)}"


def _advice(hints: list[str | None], any_json: bool) -> str:
    """Joins what the faults advise; a row without advice of its own is to be corrected or removed."""
    known = [hint for hint in hints if hint is not None][:_SHOWN_HINTS]
    if None in hints:
        # A table or plain text: correcting each line makes no sense.
        known.append(
            "correct or remove the named lines and submit again" if any_json else f"this is not JSONL: {ONE_A_LINE}"
        )
    return "; ".join(known)


_Reader = Callable[[Mapping[str, Any], Notes], tuple[Turn, ...]]


def _reader_of(row: Any) -> tuple[str, _Reader]:
    if isinstance(row, Unreadable):
        raise BadRow(row.reason, row.hint)
    if isinstance(row, dict):
        if "messages" in row:
            return "messages", _read_messages
        if "turns" in row:
            return "turns", _read_turns
        if "target_response" in row or "current_user_input" in row:
            return "pairs", read_pair
    refuse_known(row)
    if not isinstance(row, dict):
        raise BadRow(f"must be a JSON object, got {kind_of(row)}")
    if "_meta" in row:
        raise NoExample("_meta header")
    keys = ", ".join(shown(key) for key in list(row)[:_SHOWN_KEYS]) or "none"
    raise BadRow(
        f"no known format (keys: {keys}); expected 'messages', 'turns', or 'current_user_input' with 'target_response'"
    )


def _read_messages(row: Mapping[str, Any], notes: Notes) -> tuple[Turn, ...]:
    return check_turns(read_list(row, "messages", notes), notes)


def _read_turns(row: Mapping[str, Any], notes: Notes) -> tuple[Turn, ...]:
    return check_turns(read_list(row, "turns", notes), notes)
