"""A conversation as it is trained on: turns in order, and where they stand in the file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message. `trained` marks text that carries loss; only an assistant's can."""

    role: Role
    content: str
    trained: bool


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and where they are in the file: a line of JSONL, or the item's number in a document.

    Rows with the same `conversation_id` are parts of one conversation."""

    turns: tuple[Turn, ...]
    place: str
    conversation_id: str | None = None

    def key(self) -> str:
        """Equal for equal conversations; used to find duplicates and to split."""
        return json.dumps([[turn.role, turn.content, turn.trained] for turn in self.turns], ensure_ascii=False)
