"""From a list of messages to turns: roles, content, and what no model can learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.data.formats.conversation import Turn
from training.data.formats.faults import BadRow, NoExample, kind_of, shown
from training.data.formats.row_keys import (
    MEDIA,
    REASONING,
    TOOLS,
    Notes,
    check_message_keys,
    check_part_keys,
    is_trained,
)
from training.data.formats.unsupported import PANDAS, holds_json

_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_TOOL_ROLES = (
    "tool",
    "function",
    "ipython",
    "observation",
    "environment",
    "function_call",
    "tool_call",
    "tool_response",
)
# The types of content parts in use; text alone can be trained on.
_PART_TYPES = {
    **dict.fromkeys(("image", "image_url", "input_image", "audio", "input_audio", "audio_url"), MEDIA),
    **dict.fromkeys(("video", "video_url", "file", "input_file", "document"), MEDIA),
    **dict.fromkeys(("tool_use", "tool_result", "tool_call", "function_call", "function_call_output"), TOOLS),
    **dict.fromkeys(("thinking", "redacted_thinking", "reasoning"), REASONING),
    "input_text": 'write "type": "text"',
    "output_text": 'write "type": "text"',
}


def read_list(row: Mapping[str, Any], key: str, notes: Notes, *, may_be_empty: bool = False) -> list[Turn]:
    """Reads a list of messages. Raises BadRow."""
    items = row[key]
    if not isinstance(items, list):
        if isinstance(items, str) and holds_json(items):
            raise BadRow(f"{key!r} is JSON inside of text: it was encoded twice", "write the list itself")
        if isinstance(items, dict) and items and all(index.isdecimal() for index in items):
            raise BadRow(f"{key!r} is a column of a table exported by pandas", PANDAS)
        raise BadRow(f"{key!r} must be a list, got {kind_of(items)}")
    if not items and not may_be_empty:
        raise BadRow(f"{key!r} is empty")
    turns = []
    for number, item in enumerate(items, start=1):
        where = f"{key}[{number}]"
        if not isinstance(item, dict):
            raise BadRow(f"{where} must be an object with role and content, got {kind_of(item)}")
        if item.keys() != {"role", "content"}:
            check_message_keys(item, where, notes)
        role = item.get("role")
        if role not in ("system", "user", "assistant"):
            raise _unknown_role(item, where)
        content = text_of(item.get("content"), f"{where}.content", notes, may_be_empty=role == "system")
        trained = is_trained(item, role, where)
        if role == "assistant" and not trained:
            notes.excluded_answers += 1
        turns.append(Turn(role, content, trained))
    return turns


def check_turns(turns: list[Turn], notes: Notes) -> tuple[Turn, ...]:
    """Refuses turns that no model can learn from; drops those after the last trained answer, which carry no loss."""
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("a system message is not the first message")
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        only = {turn.role for turn in turns}
        raise BadRow(f"has no assistant message to learn from (only {' and '.join(sorted(only)) or 'nothing'})")
    trained = [index for index in answers if turns[index].trained]
    if not trained:
        raise NoExample("every answer has weight 0")
    if all(turn.role == "assistant" for turn in turns[: trained[-1]]):
        raise BadRow("there is no message before the answer")
    if answers[-1] < len(turns) - 1:
        notes.unanswered += 1
    return tuple(turns[: trained[-1] + 1])


def text_of(value: Any, where: str, notes: Notes, *, may_be_empty: bool = False) -> str:
    """Returns a string, or the joined text parts of the multi-part form. Raises BadRow; nothing is made to fit."""
    if isinstance(value, list) and value:
        value = "".join(_text_of_part(part, f"{where}[{number}]", notes) for number, part in enumerate(value, start=1))
    if value is None:
        raise BadRow(f"{where} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{where} must be text, got {kind_of(value)}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"{where} is empty")
    return value


def _text_of_part(part: Any, where: str, notes: Notes) -> str:
    if not isinstance(part, dict):
        raise BadRow(f'{where} must be an object {{"type": "text", "text": …}}, got {kind_of(part)}')
    kind = part.get("type")
    if kind != "text":
        if kind is None and isinstance(part.get("text"), str):
            raise BadRow(f"{where} has no type, as in the formats of Bedrock and Gemini", 'write "type": "text" in it')
        what = "has no type" if kind is None else f"is of the type {shown(kind)}, not text"
        raise BadRow(f"{where} {what}", _PART_TYPES.get(kind) if isinstance(kind, str) else None)
    words = part.get("text")
    if not isinstance(words, str):
        raise BadRow(f"{where}.text must be text, got {kind_of(words)}" if "text" in part else f"{where} has no 'text'")
    check_part_keys(part, where, notes)
    return words


def _unknown_role(item: Mapping[str, Any], where: str) -> BadRow:
    role = item.get("role")
    if role is None:
        if "from" in item:
            return BadRow(
                f"{where} has from instead of a role", "rename from to role (human to user, gpt to assistant)"
            )
        return BadRow(f"{where} has no role")
    word = role.strip().lower() if isinstance(role, str) else ""
    if word in _TOOL_ROLES:
        return BadRow(f"{where} has the role {role!r}", TOOLS)
    if word == "developer":
        return BadRow(f"{where} has the role {role!r}", "call it system: that is what open models know it as")
    meant = _OTHER_ROLES.get(word) or (word if word in ("system", "user", "assistant") else None)
    suggestion = f" (did you mean {meant!r}?)" if meant else "; use system, user or assistant"
    return BadRow(f"{where} has the unknown role {shown(role)}{suggestion}")
