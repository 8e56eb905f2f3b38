"""The prompts of a comparison: from a file, or the beginnings of held-out conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.formats.conversation import Conversation, Role, Turn
from training.data.formats.file_text import read_text
from training.data.formats.read_dataset import read_conversations
from training.data.formats.rows import Unreadable, rows_of, rows_of_lines
from training.events import ErrorCode
from training.failures import TrainingFailed

_SHOWN_FAULTS = 3
_ROLES = ("system", "user", "assistant")
_HINT = (
    'write one prompt a line, or JSON lines: {"prompt": "…", "reference": "…"} or {"messages": […]} ending with the '
    "user; a dataset in any format that can be trained on will do, too"
)


@dataclass(frozen=True)
class Prompt:
    """Turns to be continued. `reference` is the answer that the data have there, if any."""

    turns: tuple[Turn, ...]
    reference: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a file of prompts. Raises TrainingFailed(dataset_invalid) naming lines and reasons."""
    try:
        text = read_text(path)
        start = text.lstrip()[:1]
        if start not in ("{", "[", '"'):
            return [_question(line.strip()) for line in text.split("\n") if line.strip()]
        rows = list(rows_of_lines(text) if start == '"' else rows_of(text))
        if not any(_is_prompt(row) for _, row in rows):
            return beginnings(read_conversations(path).conversations)
    except TrainingFailed as error:
        raise _refused(error.message.replace("the dataset", "it", 1), error.hint) from error
    prompts, faults = [], []
    for place, row in rows:
        try:
            prompts.append(_prompt_of(row))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    if faults:
        more = f", and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        raise _refused("; ".join(faults[:_SHOWN_FAULTS]) + more, _HINT)
    return prompts


def beginnings(conversations: Sequence[Conversation]) -> list[Prompt]:
    """Returns each conversation up to its first trained answer; one that opens with an answer asks for nothing."""
    found = []
    for conversation in conversations:
        turns = conversation.turns
        first = next((index for index, turn in enumerate(turns) if turn.trained and index), None)
        if first is not None:
            found.append(Prompt(turns[:first], turns[first].content))
    return found


def spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """Returns at most so many, from all over the list: neighbours in a file are often alike."""
    if len(prompts) <= most:
        return list(prompts)
    return [prompts[index * len(prompts) // most] for index in range(most)]


def _is_prompt(row: Any) -> bool:
    if isinstance(row, str):
        return True
    if not isinstance(row, dict):
        return False
    if isinstance(row.get("prompt"), str):
        return "completion" not in row
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "user"


def _prompt_of(row: Any) -> Prompt:
    """Raises ValueError with the reason."""
    if isinstance(row, Unreadable):
        raise ValueError(row.reason)
    if isinstance(row, str):
        return _question(row)
    if not _is_prompt(row):
        raise ValueError("is no prompt: it has neither a prompt nor messages that end with the user")
    reference = row.get("reference")
    if not (reference is None or isinstance(reference, str)):
        raise ValueError("its reference is no text")
    if not isinstance(row.get("prompt"), str):
        return Prompt(tuple(map(_turn, row["messages"])), reference)
    system = row.get("system")
    before = (_turn({"role": "system", "content": system}),) if system is not None else ()
    return Prompt((*before, *_question(row["prompt"]).turns), reference)


def _question(text: str) -> Prompt:
    return Prompt((_turn({"role": "user", "content": text}),))


def _turn(message: Any) -> Turn:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in _ROLES:
        raise ValueError(f"a message's role must be one of {', '.join(_ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError("a message without text")
    known: Role = role
    return Turn(known, content, trained=False)


def _refused(message: str, hint: str) -> TrainingFailed:
    return TrainingFailed(ErrorCode.DATASET_INVALID, f"the prompts cannot be used: {message}", hint)
