"""The app's pair formats: a row is one answer with the conversation before it; only the answer is trained on.

The app's own files tell a row's question twice: as `current_user_input`, and again as the last entry of the history.
Nobody will ask it twice of the trained model, and templates that want alternating roles refuse it. So what the history
repeats is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.data.formats.conversation import Turn
from training.data.formats.faults import NoExample
from training.data.formats.row_keys import Notes, Repeated
from training.data.formats.turns import check_turns, read_list, text_of


def read_pair(row: Mapping[str, Any], notes: Notes) -> tuple[Turn, ...]:
    """Reads system prompt, history, the user's message and the target; only the target carries loss.

    Notes what was left out of the history."""
    if row.get("target_response") is None:
        raise NoExample("target_response is null")
    system = None
    if (
        row.get("system_prompt") is not None
        and text_of(row["system_prompt"], "system_prompt", notes, may_be_empty=True).strip()
    ):
        system = Turn("system", text_of(row["system_prompt"], "system_prompt", notes), trained=False)
    history: list[Turn] = []
    if row.get("conversation_history") is not None:
        # Its own notes: the app describes each turn of the history, and none of it is trained on.
        said = read_list(row, "conversation_history", Notes(), may_be_empty=True)
        history = [Turn(turn.role, turn.content, trained=False) for turn in said]
    question = Turn("user", text_of(row.get("current_user_input"), "current_user_input", notes), trained=False)
    answer = Turn("assistant", text_of(row["target_response"], "target_response", notes), trained=True)
    notes.repeated.update(_leave_out_repetitions(history, system, question, answer))
    return check_turns([*([system] if system else []), *history, question, answer], notes)


def _leave_out_repetitions(history: list[Turn], system: Turn | None, question: Turn, answer: Turn) -> list[Repeated]:
    """Shortens the history in place. Returns what was left out, each at most once."""
    found: list[Repeated] = []
    if history and system and _same(history[0], system):
        del history[0]
        found.append("system")
    # Else the model would read its answer before it gives it.
    if len(history) > 1 and _same(history[-1], answer) and _same(history[-2], question):
        del history[-1]
        found.append("answer")
    if history and _same(history[-1], question):
        while history and _same(history[-1], question):
            del history[-1]
        found.append("question")
    return found


def _same(one: Turn, other: Turn) -> bool:
    return one.role == other.role and one.content.strip() == other.content.strip()
