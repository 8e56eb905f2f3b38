"""What is said of the data before training, how long preparing takes, and that midnight changes nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from tests.chat_templates import tokenizer_of
from tests.tiny_models import conversation, make_model, write_dataset
from tests.training.data.test_served_text import ODD_PIECES
from training.data import encoding
from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus, gather
from training.data.example import IGNORED
from training.data.formats.conversation import Conversation, Role, Turn
from training.data.template.rendering import Renderer
from training.data.tokenizer import stop_tokens
from training.files.model_folder import open_model_folder
from training.spec import Hyperparameters


def _template(name: str, today: date | None = None) -> ChatTemplate:
    tokenizer, stops = tokenizer_of(name)
    return ChatTemplate(tokenizer, stops=stops, today=today)


def _gather(path: Path, template: ChatTemplate, **chosen: Any) -> Corpus:
    chosen = {"validation_fraction": 0, **chosen}
    return gather(path, None, Hyperparameters.model_validate(chosen), template, context_length=100_000)


def _rows(*conversations: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": role, "content": text} for role, text in rows]} for rows in conversations]


def test_each_thing_that_was_done_to_the_data_is_said_once_with_its_count_and_line(tmp_path: Path) -> None:
    plain = (("user", "Hello?"), ("assistant", "Hello."))
    rows = _rows(
        (("user", "Hello?"), ("user", "Anyone?"), ("assistant", "Yes.")),
        (("user", "Is it </s>?"), ("assistant", "It is.")),
        (("user", "Hello?"), ("assistant", "Hello.</s>")),
        (("user", "Hello?"), ("assistant", "Bye.</s>")),
        (("system", "Be brief."), *plain),
        (("system", ""), *plain),
    )
    corpus = _gather(write_dataset(tmp_path / "d.jsonl", rows), _template("mistral-v0.2"))
    said = {remark.code: remark for remark in corpus.remarks}
    assert said["turns_merged"].data == {"count": 1, "first": "line 1"}
    assert said["control_tokens"].data == {"count": 1, "first": "line 2"}
    assert said["end_marks_removed"].data == {"count": 2, "first": "line 3"}
    assert "system_folded" in said and "empty_system_message" not in said


def test_a_system_text_that_the_template_adds_is_said(tmp_path: Path) -> None:
    plain = (("user", "Hello?"), ("assistant", "Hello."))
    path = write_dataset(
        tmp_path / "d.jsonl", _rows(plain, (("system", ""), *plain), (("system", "Be brief."), *plain))
    )
    said = {remark.code: remark for remark in _gather(path, _template("qwen2_5")).remarks}
    assert "You are Qwen" in said["default_system_text"].message
    assert said["default_system_text"].data == {"count": 1}
    assert said["empty_system_message"].data == {"count": 1, "first": "line 2"}
    assert not {"default_system_text", "end_added"} & {
        remark.code for remark in _gather(path, _template("llama3")).remarks
    }


def test_a_split_conversation_and_an_added_end_are_said(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d.jsonl", [conversation(1, exchanges=3)])
    corpus = _gather(path, _template("qwen3_5_think"))
    assert len(corpus.train) == 3
    (remark,) = [remark for remark in corpus.remarks if remark.code == "split_by_answer"]
    assert "1 conversations (the first: line 1) became 3 examples" in remark.message
    (remark,) = [remark for remark in _gather(path, _template("glm4moe")).remarks if remark.code == "end_added"]
    assert remark.data == {"token": "<|user|>"}


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_two_attempts_on_two_days_have_the_same_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a checkpoint from before midnight is continued after it."""
    path = write_dataset(tmp_path / "d.jsonl", [conversation(number) for number in range(4)])
    digests, without = set(), set()
    for day in (27, 28):
        monkeypatch.setattr(chat_template_utils, "datetime", _Clock(day))
        chat_template_utils._compile_jinja_template.cache_clear()
        digests.add(_gather(path, _template(name, date(2026, 11, 27))).digest())
        without.add(_gather(path, _template(name)).digest())
    monkeypatch.undo()
    chat_template_utils._compile_jinja_template.cache_clear()
    assert len(digests) == 1 and len(without) == 2


class _Clock:
    def __init__(self, day: int) -> None:
        self._now = datetime(2026, 11, day, 23, 59)

    def now(self) -> datetime:
        return self._now


def test_preparing_speaks_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host ends a trainer that is silent for too long; preparing a large file takes minutes."""
    monkeypatch.setattr(encoding, "_TICK_SECONDS", 0.0)
    heard: list[tuple[int, int]] = []
    path = write_dataset(tmp_path / "d.jsonl", [conversation(number) for number in range(5)])
    gather(
        path,
        None,
        Hyperparameters(validation_fraction=0),
        _template("chatml"),
        1000,
        tick=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(done, 5) for done in range(5)]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "mistral-v0.2", "glm4moe"])
def test_a_long_conversation_is_rendered_a_few_times_however_many_answers_it_has(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time grows with the tokens and no faster: counted in characters that the template writes."""
    written: list[int] = []
    render = Renderer.__call__

    def counting(self: Renderer, *arguments: Any, **options: Any) -> str:
        text = render(self, *arguments, **options)
        written.append(len(text))
        return text

    template = _template(name)
    monkeypatch.setattr(Renderer, "__call__", counting)
    for exchanges in (20, 200):
        written.clear()
        path = write_dataset(tmp_path / "d.jsonl", [conversation(1, exchanges=exchanges)])
        corpus = _gather(path, template, max_length=128 * exchanges // 10)
        (example,) = corpus.train
        assert len(example.input_ids) <= 128 * exchanges // 10
        # The whole, its last prompt, its marks, the shorter prompts; and the same again for what is cut.
        assert sum(written) < 12 * max(written)


def test_a_conversation_is_cut_after_the_last_answer_that_fits(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d.jsonl", [conversation(1, exchanges=40)])
    for name in ("chatml", "qwen3", "qwen3_5_think", "mistral-v0.2", "gptoss"):
        template = _template(name)
        whole = _gather(path, template)
        for most in (300, 500):
            cut = _gather(path, template, max_length=most)
            longest = max(len(example.input_ids) for example in cut.train)
            assert longest <= most
            # One more exchange would not have fitted.
            assert longest > most - 100
            assert longest < max(len(example.input_ids) for example in whole.train)


def test_the_tokens_that_stop_a_server_are_read_from_the_models_files(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert stop_tokens(open_model_folder(folder, "m")) >= {5, 7}
    (folder / "generation_config.json").write_text("[")
    assert stop_tokens(open_model_folder(folder, "m")) == {2}


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "qwen3_instruct_2507"])
def test_the_answers_of_invented_conversations_are_what_is_trained(name: str) -> None:
    """Two thousand conversations of odd pieces: what is trained is each answer and its end, and nothing else."""
    chosen = random.Random(17)
    tokenizer, stops = tokenizer_of(name)
    template = ChatTemplate(tokenizer, stops=stops)
    for _ in range(500):
        turns = []
        for number in range(2 * chosen.randint(1, 5)):
            role: Role = "assistant" if number % 2 else "user"
            words = "".join(chosen.choice(ODD_PIECES) for _ in range(chosen.randint(1, 6))) + chosen.choice(
                ["x", "é", "."]
            )
            turns.append(Turn(role, words, trained=role == "assistant" and (chosen.random() < 0.8 or number == 1)))
        if not turns[-1].trained:
            turns[-1] = Turn("assistant", turns[-1].content, trained=True)
        found = [
            tokenizer.decode([label for label in run if label not in stops]).strip()
            for example in template.encode(Conversation(tuple(turns), "line 1")).examples
            for run in _runs(example.labels)
        ]
        assert found == [turn.content.strip() for turn in turns if turn.trained]


def _runs(labels: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
