"""From a list of messages to turns: roles, content, and what no model can learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.data.formats.conversation import Turn
from training.data.formats.faults import BadRow


def read_list(row: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> list[Turn]:
    items = row[key]
    if not isinstance(items, list):
        raise BadRow(f"{key!r} must be a list, got {kind_of(items)}")
    if not items and not may_be_empty:
        raise BadRow(f"{key!r} is empty")
    turns = []
    for number, item in enumerate(items, start=1):
        where = f"{key}[{number}]"
        if not isinstance(item, dict):
            raise BadRow(f"{where} must be an object with role and content, got {kind_of(item)}")
        role = item.get("role")
        if role not in ("system", "user", "assistant"):
            hint = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}.get(str(role))
            suggestion = f" (did you mean {hint!r}?)" if hint else "; use system, user or assistant"
            raise BadRow(
                f"{where} has no role" if role is None else f"{where} has the unknown role {role!r}{suggestion}"
            )
        content = text_of(item.get("content"), f"{where}.content", may_be_empty=role == "system")
        if role == "system" and not content.strip():
            continue
        turns.append(Turn(role, content, trained=role == "assistant"))
    return turns


def check_turns(turns: list[Turn]) -> tuple[Turn, ...]:
    """Refuses turns that no model can learn from; drops those after the last answer, which carry no loss."""
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("a system message is not the first message")
    answers = [index for index, turn in enumerate(turns) if turn.trained]
    if not answers:
        only = {turn.role for turn in turns}
        raise BadRow(f"has no assistant message to learn from (only {' and '.join(sorted(only)) or 'nothing'})")
    if not any(turn.role == "user" for turn in turns[: answers[-1]]):
        raise BadRow("there is no user message before the answer")
    return tuple(turns[: answers[-1] + 1])


def text_of(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    """Returns a string, or the joined text parts of the multi-part form."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    ):
        value = "".join(str(part.get("text", "")) for part in value)
    if value is None:
        raise BadRow(f"{where} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{where} must be text, got {kind_of(value)}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"{where} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"{where} holds half a surrogate pair, which is no character")
    return value


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
