"""From text to rows: JSONL, a JSON array or one document; each row with its place. What a row means is not known."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.data.formats.faults import BadRow, invalid, shown
from training.data.formats.unsupported import ONE_LINE_EACH, refuse_known

# Longer than any conversation that a model can read (a million tokens is about 4 MB); still parsed within a second.
MAX_LINE_BYTES = 32 * 1024**2
# What JSON allows between two values.
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for a row that could not be parsed."""

    reason: str
    hint: str | None = None


class NotJson(Unreadable):
    """Placeholder for a line that is not JSON."""


class _NotJson(BadRow):
    """A line is not JSON at all; the other faults of parsing are of JSON that cannot be used."""


def rows_of(text: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) of a file in any notation. Raises TrainingFailed if the file as a whole is something else."""
    start = text.lstrip()[:1]
    if start == "[":
        return _rows_of_array(text)
    document = _document(text) if start == "{" else None
    return rows_of_lines(text) if document is None else rows_of_document(document)


def rows_of_document(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the pairs of a brightrun-lora-v4 document, each with the `conversation_id` of its conversation."""
    conversations = document["conversations"]
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


def rows_of_lines(text: str) -> Iterator[tuple[str, Any]]:
    # Split at newlines only: str.splitlines also splits at U+2028, which is legal inside a JSON string.
    for number, whole in enumerate(text.split("\n"), start=1):
        # Files that were put together each bring their own byte order mark.
        line = whole.lstrip("\ufeff")
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES:
            yield f"line {number}", Unreadable(f"{len(line):,} characters; the limit is {MAX_LINE_BYTES:,}")
            continue
        try:
            yield f"line {number}", parse_json(line)
        except BadRow as error:
            kind = NotJson if isinstance(error, _NotJson) else Unreadable
            yield f"line {number}", kind(str(error), error.hint)


def _document(text: str) -> Mapping[str, Any] | None:
    """Returns the file if it is one brightrun-lora-v4 document, None if it is JSONL; refuses other documents."""
    lines = [line for line in text.split("\n", 1000) if line.strip()]
    try:
        head = parse_json(lines[0])
    except BadRow:
        head = None
    if head is not None:
        # One object on the first line: a document if nothing follows it, else the first row of JSONL.
        return head if len(lines) == 1 and _is_v4(head) else None
    try:
        document = parse_json(text)
    except BadRow as error:
        if _begins_one_object(lines):
            raise invalid(
                f"the JSON document cannot be read: {error}", error.hint or "correct it and submit again"
            ) from None
        return None
    if _is_v4(document):
        return document  # type: ignore[no-any-return]
    _refuse_document(document)
    raise invalid("the dataset is one JSON object over several lines, not one object a line", ONE_LINE_EACH)


def _is_v4(document: Any) -> bool:
    """True unless its conversations are lists of messages, as in ShareGPT's format."""
    conversations = document.get("conversations") if isinstance(document, dict) else None
    if not isinstance(conversations, list) or "messages" in document:
        return False
    return not any(
        isinstance(item, dict) and item.keys() & {"from", "value", "role", "content"} for item in conversations
    )


def _refuse_document(document: Any) -> None:
    try:
        refuse_known(document)
    except BadRow as error:
        raise invalid(f"the dataset cannot be used: {error}", error.hint or "") from None


def _begins_one_object(lines: list[str]) -> bool:
    """True for one object over several lines: the first only begins it, and the second begins no other."""
    try:
        json.loads(lines[0])
    except json.JSONDecodeError as error:
        ends_too_early = error.pos >= len(lines[0].rstrip())
        return ends_too_early and len(lines) > 1 and not lines[1].startswith("{")
    except (ValueError, RecursionError):
        return False
    return False


def _rows_of_array(text: str) -> Iterator[tuple[str, Any]]:
    try:
        document = parse_json(text)
    except BadRow as error:
        if _is_json(text.lstrip().partition("\n")[0]):
            yield from rows_of_lines(text)
            return
        place, reason = _first_fault(text)
        hint = error.hint or "correct the file and submit again"
        raise invalid(f"the JSON document cannot be read: {place}{reason or error}", hint) from None
    for number, row in enumerate(document, start=1):
        yield f"item {number}", row


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except BadRow:
        return False
    return True


def _first_fault(text: str) -> tuple[str, str]:
    """Returns the item of an array that cannot be parsed and its line, and why: json gives no place for some faults."""
    decoder = json.JSONDecoder(**_STRICT)
    at = text.index("[") + 1
    for number in range(1, len(text)):
        while text[at : at + 1] in (*_BLANK, ",") and at < len(text):
            at += 1
        try:
            at = decoder.raw_decode(text, at)[1]
        except json.JSONDecodeError:
            return "", ""
        except (ValueError, RecursionError) as error:
            return f"item {number} (line {text.count(chr(10), 0, at) + 1}): ", str(_told(error))
    return "", ""


def parse_json(text: str) -> Any:
    """Parses strict JSON: no NaN, no infinity, no duplicate keys, no half characters. Raises BadRow."""
    try:
        value = json.loads(text, **_STRICT)
        if "\\ud" in text or "\\uD" in text:
            _refuse_half_characters(value)
    except (ValueError, RecursionError) as error:
        raise _told(error) from None
    return value


def _told(error: ValueError | RecursionError) -> BadRow:
    if isinstance(error, BadRow):
        return error
    if isinstance(error, json.JSONDecodeError):
        if error.msg == "Extra data" and error.doc[error.pos] in "{[":
            return BadRow("several JSON values one after the other", ONE_LINE_EACH)
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        is_python = error.doc.lstrip().startswith("{'")
        hint = "this is Python's notation: write the rows with json.dumps" if is_python else None
        return _NotJson(f"not JSON ({error.msg} at {where})", hint)
    if isinstance(error, RecursionError):
        return BadRow("nested too deeply")
    # Python refuses to read an integer of more than 4,300 digits.
    return BadRow("a number has too many digits")


def _refuse_constant(name: str) -> Any:
    raise BadRow(f"{name} is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise BadRow(f"the number {digits[:20]} is too large")
    return number


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise BadRow(f"the key {shown(twice[0])} appears twice in one object")
    return found


def _refuse_half_characters(value: Any) -> None:
    """An escape such as \\ud83d without its other half can be parsed, but neither written nor sent."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"half a surrogate pair (\\u{ord(error.object[error.start]):04x}) is no character") from None


_STRICT: dict[str, Any] = {
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
    "object_pairs_hook": _refuse_duplicate_keys,
}
