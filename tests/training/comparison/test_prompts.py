"""Files of prompts as people write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.comparison.prompts import Prompt, read_prompts, spread
from training.data.formats.conversation import Turn
from training.failures import TrainingFailed

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
PAIR = {"current_user_input": "Why?", "target_response": "Because.", "conversation_history": []}


def _write(folder: Path, text: str) -> Path:
    file = folder / "prompts"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "asked", "reference"),
    [
        ("Why?\n\n  And how?  \n", "Why?", None),
        ('"Why?"\n"And how?"\n', "Why?", None),
        ('["Why?", "And how?"]', "Why?", None),
        (json.dumps({"prompt": "Why?", "reference": "Because."}), "Why?", "Because."),
        (json.dumps({"messages": [USER]}), "Why?", None),
        (json.dumps({"messages": [USER, ANSWER]}), "Why?", "Because."),
        (json.dumps(PAIR), "Why?", "Because."),
    ],
)
def test_lines_json_and_datasets_are_prompts(text: str, asked: str, reference: str | None, tmp_path: Path) -> None:
    first = read_prompts(_write(tmp_path, text))[0]
    assert (first.turns[-1].content, first.reference) == (asked, reference)


def test_a_system_text_and_earlier_turns_are_part_of_a_prompt(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Why?", "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER]},
    ]
    one, other = read_prompts(_write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert [turn.role for turn in one.turns] == ["system", "user"]
    assert [turn.role for turn in other.turns] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ('{"prompt": "Why?"}\n{"prompt": " "}', "line 2: a message without text"),
        ('{"prompt": "Why?"}\n{"question": "How?"}', "line 2: is no prompt"),
        ('{"prompt": "Why?"}\nHow?', "line 2: not JSON"),
        ('{"prompt": "Why?", "reference": 3}', "line 1: its reference is no text"),
        (
            '{"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]}',
            "line 1: a message's role",
        ),
        ('{"question": "How?"}', "the prompts cannot be used"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as failed:
        read_prompts(_write(tmp_path, text))
    assert said in failed.value.message
    assert failed.value.hint


def test_a_few_of_many_come_from_all_over() -> None:
    prompts = [Prompt((Turn("user", str(number), trained=False),)) for number in range(10)]
    assert [prompt.turns[0].content for prompt in spread(prompts, 4)] == ["0", "2", "5", "7"]
    assert spread(prompts, 20) == prompts
