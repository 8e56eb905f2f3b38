"""Reads conversations from a dataset file: detects the format, and reports every unusable line with its reason.

Four formats are read (see docs/how-to/datasets.md). They are detected by content, because a file's name says nothing
reliable about it. A malformed line fails the job, and the message lists the first such lines: the system before this
one dropped lines silently and trained on nothing. Lines that are well formed but no example (a `_meta` header, a pair
whose target_response is null) are counted and reported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from training.events import ErrorCode
from training.failures import TrainingFailed

Role = Literal["system", "user", "assistant"]

# Longer than any conversation that a model can read (a million tokens is about 4 MB); still parsed within a second.
MAX_LINE_BYTES = 32 * 1024**2
_SHOWN_FAULTS = 10
_ONE_A_LINE = 'give one JSON object a line: {"messages": [...]}'


@dataclass(frozen=True)
class Turn:
    """One message. `trained` marks text that carries loss; only an assistant's can."""

    role: Role
    content: str
    trained: bool


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and where they are in the file: a line of JSONL, or the item's number in a document."""

    turns: tuple[Turn, ...]
    place: str

    def key(self) -> str:
        """Equal for equal conversations; used to find duplicates and to split."""
        return json.dumps([[turn.role, turn.content, turn.trained] for turn in self.turns], ensure_ascii=False)


@dataclass(frozen=True)
class Reading:
    """The content of a file. `skipped` counts lines that are no example, by reason."""

    format: str
    conversations: tuple[Conversation, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)


class _BadRow(ValueError):
    """A row cannot be used; the message says why in the user's terms."""


class _NoExample(Exception):
    """A well-formed row that is no example; the message is the reason under which it is counted."""


def read_conversations(path: Path) -> Reading:
    """Reads a dataset in any of the four formats. Raises TrainingFailed(dataset_invalid) naming lines and reasons."""
    text = _decode(path)
    document = _whole_document(text)
    rows = _rows_of_document(document) if document is not None else _rows_of_lines(text)
    return _read_rows(rows)


def invalid(message: str, hint: str) -> TrainingFailed:
    """This module's error: the dataset must change, not the service."""
    return TrainingFailed(ErrorCode.DATASET_INVALID, message, hint)


def list_faults(faults: list[tuple[str, str]]) -> str:
    """Joins (place, reason) pairs into one sentence, with the first ten in full."""
    shown = "; ".join(f"{place}: {reason}" for place, reason in faults[:_SHOWN_FAULTS])
    more = len(faults) - _SHOWN_FAULTS
    return shown + (f"; and {more} more" if more > 0 else "")


# --- bytes to rows ----------------------------------------------------------------------------------------------------

_MAGIC = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a zip or xlsx archive",
    b"PAR1": "a parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF",
}


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TrainingFailed(
            ErrorCode.DATASET_UNREACHABLE,
            f"the dataset file {path.name} does not exist",
            "check the dataset URL and submit again",
            transient=True,
        ) from None
    except IsADirectoryError:
        raise invalid(
            f"the dataset {path.name} is a folder, not a dataset file", "give one JSON or JSONL file"
        ) from None
    for magic, what in _MAGIC.items():
        if raw.startswith(magic):
            raise invalid(
                f"the dataset is {what}, not JSON or JSONL", "save it as UTF-8 JSONL, one conversation a line"
            )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise invalid(
            f"line {line} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})",
            "save the file as UTF-8 and submit again",
        ) from None
    if not text.strip():
        raise invalid("the dataset is empty", _ONE_A_LINE)
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise invalid(f"line {line} contains a zero byte: this is not a text file", "save the file as UTF-8 JSONL")
    return text


def _whole_document(text: str) -> Any | None:
    """Returns the file as one JSON document (a list, or brightrun-lora-v4), or None if it is JSONL."""
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        return None
    if start == "{":
        # It is JSONL unless the first line alone is not a complete object (a multi-line document) or is a v4 document.
        first = next(line for line in text.splitlines() if line.strip())
        try:
            head = _parse(first)
        except _BadRow:
            head = None
        if head is not None and not (isinstance(head, dict) and _is_v4(head)):
            return None
        if head is None and '"training_pairs"' not in text and '"conversations"' not in text:
            return None
    try:
        return _parse(text)
    except _BadRow as error:
        if start == "[":
            raise invalid(f"the JSON document cannot be read: {error}", "correct the file and submit again") from None
        # Several lines and the first is broken: let the JSONL reader report it, line by line.
        return None


def _is_v4(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("conversations"), list) and "messages" not in document


def _rows_of_document(document: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(document, list):
        for number, row in enumerate(document, start=1):
            yield f"item {number}", row
        return
    conversations = document.get("conversations") if isinstance(document, dict) else None
    if not isinstance(conversations, list):
        raise invalid(
            "the JSON document holds no list of conversations",
            'give JSONL with "messages", or a brightrun-lora-v4 document with "conversations"',
        )
    if not conversations:
        raise invalid(
            'the document\'s "conversations" list is empty', "export the dataset again with its conversations"
        )
    for number, conversation in enumerate(conversations, start=1):
        pairs = conversation.get("training_pairs") if isinstance(conversation, dict) else None
        if not isinstance(pairs, list):
            yield f"conversation {number}", _Unreadable('has no list "training_pairs"')
            continue
        for pair_number, pair in enumerate(pairs, start=1):
            yield f"conversation {number}, pair {pair_number}", pair


@dataclass(frozen=True)
class _Unreadable:
    """Placeholder for a row that could not be parsed."""

    reason: str


class _NotJson(_Unreadable):
    """Placeholder for a line that is not JSON."""


def _rows_of_lines(text: str) -> Iterator[tuple[str, Any]]:
    # Split at newlines only: str.splitlines also splits at U+2028, which is legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES:
            yield f"line {number}", _Unreadable(f"{len(line):,} characters; the limit is {MAX_LINE_BYTES:,}")
            continue
        try:
            yield f"line {number}", _parse(line)
        except _BadRow as error:
            yield f"line {number}", _NotJson(str(error))


def _parse(text: str) -> Any:
    """Parses strict JSON: no NaN, no infinity, no duplicate keys. Raises _BadRow."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicate_keys)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise _BadRow(f"not JSON ({error.msg} at {where})") from None
    except RecursionError:
        raise _BadRow("nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise _BadRow(f"{name} is not JSON")


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise _BadRow(f"the key {twice[0]!r} appears twice in one object")
    return found


# --- rows to conversations --------------------------------------------------------------------------------------------


def _read_rows(rows: Iterator[tuple[str, Any]]) -> Reading:
    conversations: list[Conversation] = []
    faults: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    file_format: str | None = None
    any_json = False
    for place, row in rows:
        any_json = any_json or not isinstance(row, _NotJson)
        try:
            name, reader = _reader_of(row)
            if file_format is None:
                file_format = name
            elif name != file_format:
                raise _BadRow(f"is a row of the format {name}, but the file began as {file_format}")
            conversations.append(Conversation(reader(row), place))
        except _NoExample as reason:
            skipped[str(reason)] += 1
        except _BadRow as error:
            faults.append((place, str(error)))
    if faults:
        count = "1 line" if len(faults) == 1 else f"{len(faults)} lines"
        raise invalid(
            f"{count} of the dataset cannot be used: {list_faults(faults)}",
            # A table or plain text: correcting each line makes no sense.
            "correct or remove the named lines and submit again" if any_json else f"this is not JSONL: {_ONE_A_LINE}",
        )
    if not conversations:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "no rows"
        raise invalid(f"the dataset holds no example ({reasons})", "add at least one conversation with an answer")
    return Reading(file_format or "messages", tuple(conversations), dict(skipped))


_Reader = Callable[[Mapping[str, Any]], tuple[Turn, ...]]


def _reader_of(row: Any) -> tuple[str, _Reader]:
    if isinstance(row, _Unreadable):
        raise _BadRow(row.reason)
    if not isinstance(row, dict):
        raise _BadRow(f"must be a JSON object, got {_kind(row)}")
    if "_meta" in row:
        raise _NoExample("_meta header")
    if "messages" in row:
        return "messages", _read_messages
    if "turns" in row:
        return "turns", _read_turns
    if "target_response" in row or "current_user_input" in row:
        return "pairs", _read_pair
    keys = ", ".join(repr(key) for key in list(row)[:8]) or "none"
    raise _BadRow(
        f"no known format (keys: {keys}); expected 'messages', 'turns', or 'current_user_input' with 'target_response'"
    )


def _read_messages(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    return _check_turns(_read_list(row, "messages"))


def _read_turns(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    return _check_turns(_read_list(row, "turns"))


def _read_pair(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Reads system prompt, history, the user's message and the target; only the target carries loss."""
    if row.get("target_response") is None:
        raise _NoExample("target_response is null")
    turns: list[Turn] = []
    system = row.get("system_prompt")
    if system is not None and _text(system, "system_prompt", may_be_empty=True).strip():
        turns.append(Turn("system", _text(system, "system_prompt"), trained=False))
    if row.get("conversation_history") is not None:
        history = _read_list(row, "conversation_history", may_be_empty=True)
        turns += [Turn(turn.role, turn.content, trained=False) for turn in history]
    turns.append(Turn("user", _text(row.get("current_user_input"), "current_user_input"), trained=False))
    turns.append(Turn("assistant", _text(row["target_response"], "target_response"), trained=True))
    return _check_turns(turns)


def _read_list(row: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> list[Turn]:
    items = row[key]
    if not isinstance(items, list):
        raise _BadRow(f"{key!r} must be a list, got {_kind(items)}")
    if not items and not may_be_empty:
        raise _BadRow(f"{key!r} is empty")
    turns = []
    for number, item in enumerate(items, start=1):
        where = f"{key}[{number}]"
        if not isinstance(item, dict):
            raise _BadRow(f"{where} must be an object with role and content, got {_kind(item)}")
        role = item.get("role")
        if role not in ("system", "user", "assistant"):
            hint = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}.get(str(role))
            suggestion = f" (did you mean {hint!r}?)" if hint else "; use system, user or assistant"
            raise _BadRow(
                f"{where} has no role" if role is None else f"{where} has the unknown role {role!r}{suggestion}"
            )
        content = _text(item.get("content"), f"{where}.content", may_be_empty=role == "system")
        if role == "system" and not content.strip():
            continue
        turns.append(Turn(role, content, trained=role == "assistant"))
    return turns


def _check_turns(turns: list[Turn]) -> tuple[Turn, ...]:
    """Refuses turns that no model can learn from; drops those after the last answer, which carry no loss."""
    if any(turn.role == "system" for turn in turns[1:]):
        raise _BadRow("a system message is not the first message")
    answers = [index for index, turn in enumerate(turns) if turn.trained]
    if not answers:
        only = {turn.role for turn in turns}
        raise _BadRow(f"has no assistant message to learn from (only {' and '.join(sorted(only)) or 'nothing'})")
    if not any(turn.role == "user" for turn in turns[: answers[-1]]):
        raise _BadRow("there is no user message before the answer")
    return tuple(turns[: answers[-1] + 1])


def _text(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    """Returns a string, or the joined text parts of the multi-part form."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    ):
        value = "".join(str(part.get("text", "")) for part in value)
    if value is None:
        raise _BadRow(f"{where} is missing")
    if not isinstance(value, str):
        raise _BadRow(f"{where} must be text, got {_kind(value)}")
    if not may_be_empty and not value.strip():
        raise _BadRow(f"{where} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"{where} holds half a surrogate pair, which is no character")
    return value


def _kind(value: Any) -> str:
    return {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }.get(type(value), type(value).__name__)
