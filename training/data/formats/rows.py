"""From text to rows: JSONL, a JSON array or one document; each row with its place. What a row means is not known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.data.formats.faults import BadRow, invalid

# Longer than any conversation that a model can read (a million tokens is about 4 MB); still parsed within a second.
MAX_LINE_BYTES = 32 * 1024**2


def whole_document(text: str) -> Any | None:
    """Returns the file as one JSON document (a list, or brightrun-lora-v4), or None if it is JSONL."""
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        return None
    if start == "{":
        # It is JSONL unless the first line alone is not a complete object (a multi-line document) or is a v4 document.
        first = next(line for line in text.splitlines() if line.strip())
        try:
            head = parse_json(first)
        except BadRow:
            head = None
        if head is not None and not (isinstance(head, dict) and _is_v4(head)):
            return None
        if head is None and '"training_pairs"' not in text and '"conversations"' not in text:
            return None
    try:
        return parse_json(text)
    except BadRow as error:
        if start == "[":
            raise invalid(f"the JSON document cannot be read: {error}", "correct the file and submit again") from None
        # Several lines and the first is broken: let the JSONL reader report it, line by line.
        return None


def _is_v4(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("conversations"), list) and "messages" not in document


def rows_of_document(document: Any) -> Iterator[tuple[str, Any]]:
    """Yields each row with its place. Pairs get the `conversation_id` of the conversation that they stand in."""
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
            yield f"conversation {number}", Unreadable('has no list "training_pairs"')
            continue
        of_all = {"conversation_id": id_of(conversation.get("conversation_metadata")) or f"conversation {number}"}
        for pair_number, pair in enumerate(pairs, start=1):
            yield f"conversation {number}, pair {pair_number}", pair | of_all if isinstance(pair, dict) else pair


def id_of(about: Any) -> str | None:
    """Returns the `conversation_id` of a row, or of what is known about a conversation."""
    given = about.get("conversation_id") if isinstance(about, dict) else None
    return str(given) if isinstance(given, str | int) and str(given).strip() else None


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for a row that could not be parsed."""

    reason: str


class NotJson(Unreadable):
    """Placeholder for a line that is not JSON."""


def rows_of_lines(text: str) -> Iterator[tuple[str, Any]]:
    # Split at newlines only: str.splitlines also splits at U+2028, which is legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES:
            yield f"line {number}", Unreadable(f"{len(line):,} characters; the limit is {MAX_LINE_BYTES:,}")
            continue
        try:
            yield f"line {number}", parse_json(line)
        except BadRow as error:
            yield f"line {number}", NotJson(str(error))


def parse_json(text: str) -> Any:
    """Parses strict JSON: no NaN, no infinity, no duplicate keys. Raises BadRow."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicate_keys)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise BadRow(f"not JSON ({error.msg} at {where})") from None
    except RecursionError:
        raise BadRow("nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise BadRow(f"{name} is not JSON")


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise BadRow(f"the key {twice[0]!r} appears twice in one object")
    return found
