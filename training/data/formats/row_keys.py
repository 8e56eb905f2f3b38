"""What each key of a row and of a message means: understood, harmless, refused, or named in the report as not used.

A key that changes what a row teaches must never be ignored in silence: a tool call left out of an answer trains the
words without the call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal

from training.data.formats.faults import BadRow, shown
from training.data.formats.unsupported import BEDROCK, PREFERENCE, has

TOOLS = "tool calls are not supported yet: leave these conversations out, or write what the tool did as text"
MEDIA = "only text can be trained on: leave these conversations out, or describe in words what is shown or heard"
REASONING = (
    "reasoning is not supported as a field of its own: remove it to train on the answers alone, or write it into "
    "content between the marks that the model's chat template uses, such as <think> and </think>"
)
_SYSTEM = 'put it first in the list: {"role": "system", "content": "…"}'
_RENDERING = (
    "it would change how the chat template renders the row, which is not supported: write its text into a message"
)
_WEIGHTS = (
    "whole rows cannot be weighted: repeat or remove rows; a single answer is left out by `weight: 0` on its message"
)
_ROW_WEIGHTS = ("weight", "sample_weight")

# Of a row: each changes what it teaches.
_REFUSED_IN_ROW: dict[str, str] = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), TOOLS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos", "files"), MEDIA),
    **dict.fromkeys(("chosen", "rejected", "preferred_output", "non_preferred_output", "kto_tag"), PREFERENCE),
    **dict.fromkeys(("rejected_response", "rejected_messages"), PREFERENCE),
    **dict.fromkeys(("reasoning_content", "thinking"), REASONING),
    **dict.fromkeys(("system", "system_prompt", "systemInstruction"), _SYSTEM),
    **dict.fromkeys(("documents", "chat_template", "chat_template_kwargs"), _RENDERING),
    "schemaVersion": BEDROCK,
    **dict.fromkeys(_ROW_WEIGHTS, _WEIGHTS),
}
# Of a row: says where it comes from, and nothing about what it teaches.
_HARMLESS_IN_ROW = frozenset(
    (
        *(
            "id",
            "_id",
            "uuid",
            "idx",
            "index",
            "__index_level_0__",
            "hash",
            "conversation_id",
            "session_id",
            "prompt_id",
        ),
        *("_meta", "meta", "metadata", "source", "dataset", "split", "language", "category", "tags", "license", "url"),
        *("created_at", "updated_at", "timestamp", "date", "parallel_tool_calls", "tool_choice"),
    )
)
_UNDERSTOOD_IN_ROW: dict[str, frozenset[str]] = {
    "messages": frozenset(("messages",)),
    "turns": frozenset(("turns", "conversation_id")),
    "pairs": frozenset(
        ("conversation_id", "system_prompt", "conversation_history", "current_user_input", "target_response")
    ),
}
# Of a message.
_REFUSED_IN_MESSAGE: dict[str, str] = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tool_responses", "recipient"), TOOLS),
    **dict.fromkeys(("image", "images", "image_url", "audio", "audios", "video", "videos", "files"), MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "reasoning_details", "thinking", "thought"), REASONING),
    "refusal": "write what the model shall say as content",
}
_HARMLESS_IN_MESSAGE = frozenset(("id", "turn", "index", "timestamp", "created_at", "metadata"))
# Whether an answer is trained on: OpenAI and Mistral, Axolotl, ms-swift.
_MARKS = ("weight", "train", "loss")
_UNDERSTOOD_IN_MESSAGE = frozenset(("role", "content", *_MARKS))

# Where other formats keep a message's words.
_WORDS_ELSEWHERE = ("value", "parts", "text", "message")
_HARMLESS_IN_PART = frozenset(("type", "text", "id", "index", "cache_control"))
# What another format would train on: a row can have only one content.
_BESIDES = ("messages", "turns", "conversations", "contents", "target_response")


# What a pair's history repeats of its own row.
Repeated = Literal["question", "answer", "system"]


@dataclass
class Notes:
    """What the rows hold that is not used, to be told once with its counts."""

    unused_keys: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    excluded_answers: int = 0
    repeated: Counter[Repeated] = field(default_factory=Counter)


def check_row_keys(row: Mapping[str, Any], file_format: str, notes: Notes) -> None:
    """Refuses a row with a key that changes its meaning; notes those that are not used. Raises BadRow."""
    understood = _UNDERSTOOD_IN_ROW[file_format]
    for key in row:
        if key in understood or key in _HARMLESS_IN_ROW or not has(row, key):
            continue
        if key in _ROW_WEIGHTS and row[key] == 1:
            continue
        if key in _REFUSED_IN_ROW:
            raise BadRow(f"{key!r} is given beside {_content_key(file_format)}", _REFUSED_IN_ROW[key])
        if key in _BESIDES:
            raise BadRow(
                f"both {_content_key(file_format)!r} and {key!r} are given", "keep only the one to be trained on"
            )
        if file_format != "pairs" or _looks_like(key, understood):
            # The app's pairs carry some twenty descriptions each: they are known to be no part of the conversation.
            notes.unused_keys[key] += 1


def check_message_keys(item: Mapping[str, Any], where: str, notes: Notes) -> None:
    """The same for one message."""
    for key in item:
        if key in _UNDERSTOOD_IN_MESSAGE or key in _HARMLESS_IN_MESSAGE or not has(item, key):
            continue
        if key in _REFUSED_IN_MESSAGE:
            raise BadRow(f"{where} carries {key!r}", _REFUSED_IN_MESSAGE[key])
        if key == "channel" and item[key] != "final":
            raise BadRow(f"{where} is in the channel {shown(item[key])}", REASONING)
        if key in _WORDS_ELSEWHERE and not has(item, "content"):
            raise BadRow(f"{where} has its words under {key!r}", "write role and content in each message")
        notes.unused_keys[f"{key} of a message"] += 1


def check_part_keys(part: Mapping[str, Any], where: str, notes: Notes) -> None:
    """The same for one part of a message's content."""
    for key in part:
        if key in _HARMLESS_IN_PART or not has(part, key):
            continue
        if key in _MARKS and part[key] != 1:
            raise BadRow(
                f"{where} carries {key!r}",
                "put the mark on the whole message: a part of it cannot be left out of training",
            )
        notes.unused_keys[f"{key} of a content part"] += 1


def is_trained(item: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether this message carries loss: an assistant's, unless it is marked otherwise. Raises BadRow."""
    trained = role == "assistant"
    for key in _MARKS:
        mark = item.get(key)
        if mark is None:
            continue
        if mark not in (0, 1):
            raise BadRow(f"{where}.{key} must be 0 or 1, got {shown(mark)}")
        if mark and role != "assistant":
            raise BadRow(
                f"{where}.{key} asks to train on a {role} message", "remove the mark: only answers can be trained on"
            )
        trained = trained and bool(mark)
    return trained


def _content_key(file_format: str) -> str:
    return "target_response" if file_format == "pairs" else file_format


@lru_cache(maxsize=1024)
def _looks_like(key: str, understood: frozenset[str]) -> bool:
    return bool(get_close_matches(key, understood, n=1, cutoff=0.85))
