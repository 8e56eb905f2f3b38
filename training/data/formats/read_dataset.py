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
from training.data.formats.faults import ONE_A_LINE, BadRow, NoExample, invalid, list_faults
from training.data.formats.file_text import read_text
from training.data.formats.pairs import Repeated, read_pair
from training.data.formats.rows import NotJson, Unreadable, id_of, rows_of_document, rows_of_lines, whole_document
from training.data.formats.turns import check_turns, kind_of, read_list


@dataclass(frozen=True)
class Reading:
    """The content of a file. `skipped` counts lines that are no example, by reason; `repeated` the pairs whose history
    repeated something of their own, by what it was."""

    format: str
    conversations: tuple[Conversation, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    repeated: Mapping[Repeated, int] = field(default_factory=dict)


def read_conversations(path: Path) -> Reading:
    """Reads a dataset in any of the four formats. Raises TrainingFailed(dataset_invalid) naming lines and reasons."""
    text = read_text(path)
    document = whole_document(text)
    rows = rows_of_document(document) if document is not None else rows_of_lines(text)
    return _read_rows(rows)


def _read_rows(rows: Iterator[tuple[str, Any]]) -> Reading:
    conversations: list[Conversation] = []
    faults: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    repeated: Counter[Repeated] = Counter()
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
            conversations.append(Conversation(reader(row, repeated), place, id_of(row)))
        except NoExample as reason:
            skipped[str(reason)] += 1
        except BadRow as error:
            faults.append((place, str(error)))
    if faults:
        count = "1 line" if len(faults) == 1 else f"{len(faults)} lines"
        raise invalid(
            f"{count} of the dataset cannot be used: {list_faults(faults)}",
            # A table or plain text: correcting each line makes no sense.
            "correct or remove the named lines and submit again" if any_json else f"this is not JSONL: {ONE_A_LINE}",
        )
    if not conversations:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "no rows"
        raise invalid(f"the dataset holds no example ({reasons})", "add at least one conversation with an answer")
    return Reading(file_format or "messages", tuple(conversations), dict(skipped), dict(repeated))


_Reader = Callable[[Mapping[str, Any], Counter[Repeated]], tuple[Turn, ...]]


def _reader_of(row: Any) -> tuple[str, _Reader]:
    if isinstance(row, Unreadable):
        raise BadRow(row.reason)
    if not isinstance(row, dict):
        raise BadRow(f"must be a JSON object, got {kind_of(row)}")
    if "_meta" in row:
        raise NoExample("_meta header")
    if "messages" in row:
        return "messages", _read_messages
    if "turns" in row:
        return "turns", _read_turns
    if "target_response" in row or "current_user_input" in row:
        return "pairs", read_pair
    keys = ", ".join(repr(key) for key in list(row)[:8]) or "none"
    raise BadRow(
        f"no known format (keys: {keys}); expected 'messages', 'turns', or 'current_user_input' with 'target_response'"
    )


def _read_messages(row: Mapping[str, Any], _: Counter[Repeated]) -> tuple[Turn, ...]:
    return check_turns(read_list(row, "messages"))


def _read_turns(row: Mapping[str, Any], _: Counter[Repeated]) -> tuple[Turn, ...]:
    return check_turns(read_list(row, "turns"))
