"""The app's pair formats: a row is one answer with the conversation before it; only the answer is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.data.formats.conversation import Turn
from training.data.formats.faults import NoExample
from training.data.formats.turns import check_turns, read_list, text_of


def read_pair(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Reads system prompt, history, the user's message and the target; only the target carries loss."""
    if row.get("target_response") is None:
        raise NoExample("target_response is null")
    turns: list[Turn] = []
    system = row.get("system_prompt")
    if system is not None and text_of(system, "system_prompt", may_be_empty=True).strip():
        turns.append(Turn("system", text_of(system, "system_prompt"), trained=False))
    if row.get("conversation_history") is not None:
        history = read_list(row, "conversation_history", may_be_empty=True)
        turns += [Turn(turn.role, turn.content, trained=False) for turn in history]
    turns.append(Turn("user", text_of(row.get("current_user_input"), "current_user_input"), trained=False))
    turns.append(Turn("assistant", text_of(row["target_response"], "target_response"), trained=True))
    return check_turns(turns)
