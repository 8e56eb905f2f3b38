"""The page on serving shows what the model card of its example says, and commands that there are."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.main import get_command

from daemon.__main__ import app
from tests.docs.blocks import Block, blocks
from tests.paths import ROOT
from training.data.template.thinking import Thinking
from training.files.vllm_ranks import VLLM_RANKS
from training.results.history import RunHistory
from training.results.model_card import Trained, model_card
from training.results.serving import serving_of

PAGE = "docs/how-to/serve-your-adapter.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
EXAMPLE = serving_of(
    {"base_model_name_or_path": "Qwen/Qwen3-8B", "r": 24, "target_modules": ["q_proj"]},
    {},
    peft="0.14",
    brings_template=False,
    thinking=Thinking(),
)
CARD = model_card(EXAMPLE, Trained({}, {}, "nf4", "bfloat16", RunHistory(), {}), None)


def _blocks() -> list[Block]:
    return [block for block in blocks() if block.page == PAGE]


def _commands() -> list[list[str]]:
    scripts = [block.text.replace("\\\n", "") for block in _blocks() if block.language == "sh"]
    return [shlex.split(line) for script in scripts for line in script.splitlines()]


def test_what_the_page_shows_is_what_the_card_of_its_example_says() -> None:
    shown = [block.text for block in _blocks() if "download" not in block.text]
    assert len(shown) >= 6
    assert [text for text in shown if text not in CARD] == []
    variables = [line.strip() for line in TEXT.splitlines() if re.match("    [A-Z_]+=", line)]
    assert variables == [f"{name}={value}" for name, value in EXAMPLE.runpod_variables().items()]
    *ranks, last = map(str, VLLM_RANKS)
    assert f"takes {', '.join(ranks)} or {last}:" in TEXT


@pytest.mark.parametrize("words", [words for words in _commands() if words[0] == "brightrun-trainer"], ids=" ".join)
def test_our_own_commands_have_these_options(words: list[str]) -> None:
    _, name, *rest = words
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options


def test_every_other_program_is_one_that_the_page_is_about() -> None:
    assert {words[0] for words in _commands()} == {"brightrun-trainer", "cd", "vllm", "curl", "llama-server", "ollama"}
