"""All formats give the same conversations; the split, the cuts and the counts are reported and repeatable."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.app_data import FORMATS, SYSTEM_PROMPT, AppFormat, app_conversations, app_pairs, write_app_data
from tests.tiny_models import CHATML, conversation, make_tokenizer, write_conversations, write_dataset
from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus, gather
from training.data.formats.conversation import Turn
from training.data.formats.read_dataset import read_conversations
from training.failures import TrainingFailed
from training.spec import Hyperparameters

_QUESTION, _ANSWER = "Hello?", "Hello."
# The second pair of a real conversation: its history ends with its own question.
_SPOKEN = app_conversations(1)[0]
_PAIR = app_pairs(_SPOKEN)[1]
_PAIR_TURNS = (
    Turn("system", SYSTEM_PROMPT, trained=False),
    Turn("user", _SPOKEN.exchanges[0][0], trained=False),
    Turn("assistant", _SPOKEN.answers[0], trained=False),
    Turn("user", _SPOKEN.exchanges[1][0], trained=False),
    Turn("assistant", _SPOKEN.answers[1], trained=True),
)
_MESSAGES = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
_PLAIN_TURNS = (Turn("user", _QUESTION, trained=False), Turn("assistant", _ANSWER, trained=True))


def _read(tmp_path: Path, content: str | bytes) -> Any:
    path = tmp_path / "data"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_conversations(path)


@pytest.mark.parametrize(
    ("content", "turns", "name"),
    [
        (json.dumps({"messages": _MESSAGES}), _PLAIN_TURNS, "messages"),
        (json.dumps([{"messages": _MESSAGES}]), _PLAIN_TURNS, "messages"),
        (json.dumps({"conversation_id": "c", "turns": _MESSAGES}), _PLAIN_TURNS, "turns"),
        (json.dumps({"_meta": {"v": 1}}) + "\n" + json.dumps(_PAIR), _PAIR_TURNS, "pairs"),
        (json.dumps({"conversations": [{"training_pairs": [_PAIR]}]}), _PAIR_TURNS, "pairs"),
        (json.dumps({"conversations": [{"training_pairs": [_PAIR]}]}, indent=2), _PAIR_TURNS, "pairs"),
    ],
    ids=["messages", "array", "turns", "pairs", "v4 on one line", "v4 over many lines"],
)
def test_a_format_is_found_by_its_content(content: str, turns: tuple[Turn, ...], name: str, tmp_path: Path) -> None:
    reading = _read(tmp_path, content)
    assert reading.format == name
    assert [conversation.turns for conversation in reading.conversations] == [turns]


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_as_the_app_writes_it_is_read_whole(format_: AppFormat, tmp_path: Path) -> None:
    spoken = app_conversations(5)
    reading = read_conversations(write_app_data(tmp_path / "data", format_, spoken))
    answers = [answer for conversation in spoken for answer in conversation.answers]
    trained = [turn.content for read in reading.conversations for turn in read.turns if turn.trained]
    assert trained == answers and len(answers) == 19
    nulls = {"target_response is null": 1} if format_ in ("pairs", "v4") else {}
    assert reading.skipped == nulls | ({"_meta header": 1} if format_ == "pairs" else {})
    assert reading.repeated == ({"question": 19} if format_ in ("pairs", "v4") else {})


@pytest.mark.parametrize("format_", FORMATS)
def test_every_answer_is_trained_on_in_the_context_in_which_it_was_asked(format_: AppFormat, tmp_path: Path) -> None:
    for read in read_conversations(write_app_data(tmp_path / "data", format_, 5)).conversations:
        roles = [turn.role for turn in read.turns if turn.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def _entry(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("history", "repeated"),
    [
        ([*_PAIR["conversation_history"], _entry("assistant", _PAIR["target_response"])], {"answer": 1, "question": 1}),
        ([_entry("system", SYSTEM_PROMPT), *_PAIR["conversation_history"]], {"system": 1, "question": 1}),
        ([*_PAIR["conversation_history"], _entry("user", f" {_PAIR['current_user_input']}\n")], {"question": 1}),
        (_PAIR["conversation_history"][:-1], {}),
    ],
    ids=["the answer too", "the system prompt too", "twice", "nothing"],
)
def test_what_a_history_repeats_of_its_own_pair_is_left_out(
    history: list[Any], repeated: dict[str, int], tmp_path: Path
) -> None:
    reading = read_conversations(write_dataset(tmp_path / "d", [{**_PAIR, "conversation_history": history}]))
    assert reading.conversations[0].turns == _PAIR_TURNS
    assert reading.repeated == repeated


def test_the_story_says_once_how_many_histories_repeat_the_question(tmp_path: Path) -> None:
    corpus = _gather(write_app_data(tmp_path / "data", "pairs", 5))
    (said,) = [remark for remark in corpus.remarks if remark.code == "repeated_in_history"]
    assert said.data == {"question": 19} and "19 pairs" in said.message


@pytest.mark.parametrize("wrap", ["\ufeff{}", "{}\r\n", "\n\n{}\n\n"], ids=["BOM", "CRLF", "blank lines"])
def test_what_editors_leave_in_a_file_does_no_harm(wrap: str, tmp_path: Path) -> None:
    assert len(_read(tmp_path, wrap.replace("{}", json.dumps({"messages": _MESSAGES}))).conversations) == 1


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    messages = [_MESSAGES[0], {"role": "assistant", "content": "one\u2028two\x85three"}]
    reading = _read(tmp_path, json.dumps({"messages": messages}, ensure_ascii=False))
    assert reading.conversations[0].turns[1].content == "one\u2028two\x85three"


def test_null_targets_and_headers_are_counted(tmp_path: Path) -> None:
    rows = [{"_meta": {}}, _PAIR, {**_PAIR, "target_response": None}, {**_PAIR, "target_response": None}]
    reading = read_conversations(write_dataset(tmp_path / "pairs.jsonl", rows))
    assert len(reading.conversations) == 1
    assert reading.skipped == {"_meta header": 1, "target_response is null": 2}


def _gather(path: Path, validation: Path | None = None, **chosen: Any) -> Corpus:
    template = ChatTemplate(make_tokenizer(CHATML))
    return gather(path, validation, Hyperparameters.model_validate(chosen), template, context_length=2048)


def test_copies_never_stand_on_both_sides_of_the_split(tmp_path: Path) -> None:
    rows = [conversation(number % 20) for number in range(60)]
    corpus = _gather(write_dataset(tmp_path / "d.jsonl", rows))
    train = {tuple(example.input_ids) for example in corpus.train}
    assert not train & {tuple(example.input_ids) for example in corpus.validation}
    (remark,) = corpus.remarks
    assert remark.code == "duplicate_conversations" and remark.data == {"copies": 40}


def test_a_given_validation_file_is_used_whole(tmp_path: Path) -> None:
    validation = write_dataset(tmp_path / "v.jsonl", [conversation(number) for number in (20, 21, 22)])
    corpus = _gather(write_conversations(tmp_path / "d.jsonl", 20), validation)
    assert len(corpus.train) == 20 and len(corpus.validation) == 3


def test_a_validation_file_is_named_in_what_is_said_of_it(tmp_path: Path) -> None:
    train = write_conversations(tmp_path / "d.jsonl", 20)
    validation = write_dataset(tmp_path / "v.jsonl", [conversation(number) | {"score": 1} for number in range(30, 33)])
    (remark,) = _gather(train, validation).remarks
    assert remark.code == "unused_keys" and remark.message.startswith("validation file: these keys")
    with pytest.raises(TrainingFailed, match=r"the validation file cannot be used: 1 row .* line 1: 'tools'"):
        _gather(train, write_dataset(tmp_path / "v.jsonl", [conversation(1) | {"tools": [{}]}]))


def test_the_digest_is_that_of_the_words_not_of_the_file(tmp_path: Path) -> None:
    rows = [conversation(number) for number in range(20)]
    digest = _gather(write_dataset(tmp_path / "d.jsonl", rows)).digest()
    assert digest == _gather(write_dataset(tmp_path / "copy.jsonl", rows)).digest()
    rows[7] = conversation(77)
    assert digest != _gather(write_dataset(tmp_path / "d.jsonl", rows)).digest()


def test_the_length_comes_from_the_data(tmp_path: Path) -> None:
    corpus = _gather(write_conversations(tmp_path / "d.jsonl", 20))
    longest = max(len(example.input_ids) for example in (*corpus.train, *corpus.validation))
    assert longest <= corpus.max_length < longest + 64 and corpus.max_length % 64 == 0


def test_long_conversations_are_cut_after_an_answer_and_counted(tmp_path: Path) -> None:
    rows = [conversation(number) for number in range(10)] + [conversation(99, exchanges=12)]
    path = write_dataset(tmp_path / "d.jsonl", rows)
    corpus = _gather(path, max_length=128, validation_fraction=0)
    assert len(corpus.train) == 11
    cut = corpus.train[-1]
    assert 64 < len(cut.input_ids) <= 128 and cut.labels[-2] == cut.input_ids[-2]
    (remark,) = [remark for remark in corpus.remarks if remark.code == "long_conversations"]
    left = remark.data["answers_left_out"]
    assert remark.data == {"cut": 1, "left_out": 0, "max_length": 128, "answers": 22, "answers_left_out": left}
    assert 12 - left == sum(now != -100 == before for before, now in pairwise(cut.labels)) > 0
    whole = len(_gather(path, validation_fraction=0).train[-1].input_ids)
    assert f"{left} of 22 answers are not used; to use all of them, set max_length to {whole}" in remark.message
    assert _gather(path, max_length=whole, validation_fraction=0).remarks == ()


def test_a_conversation_whose_first_answer_is_too_long_is_left_out_with_its_answers_counted(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "why? " * 200}, _MESSAGES[1], *_MESSAGES]}
    path = write_dataset(tmp_path / "d.jsonl", [*(conversation(number) for number in range(5)), long])
    (remark,) = _gather(path, max_length=128, validation_fraction=0).remarks
    assert remark.data == {"cut": 0, "left_out": 1, "max_length": 128, "answers": 7, "answers_left_out": 2}
    assert "1 conversation is left out since not even the first answer fits, so that 2 of 7 answers" in remark.message


def test_without_max_length_a_conversation_of_twenty_five_thousand_tokens_is_trained_whole(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "why? " * 5_000}, _MESSAGES[1]]}
    path = write_dataset(tmp_path / "d.jsonl", [conversation(1), long])
    template = ChatTemplate(make_tokenizer(CHATML))
    corpus = gather(path, None, Hyperparameters(validation_fraction=0), template, context_length=262_144)
    assert len(corpus.train) == 2 and corpus.remarks == () and 20_000 < corpus.max_length <= 32_768
    short = gather(path, None, Hyperparameters(validation_fraction=0), template, context_length=2048)
    assert short.max_length == 2048
    assert "this model reads up to 2048 tokens: split the conversations that are longer" in short.remarks[0].message


def test_long_conversations_are_refused_by_choice_with_their_lines(tmp_path: Path) -> None:
    rows = [conversation(number) for number in range(10)] + [conversation(99, exchanges=12)]
    path = write_dataset(tmp_path / "d.jsonl", rows)
    with pytest.raises(TrainingFailed) as refused:
        _gather(path, max_length=128, validation_fraction=0, long_conversations="refuse")
    assert refused.value.code == "dataset_invalid"
    assert refused.value.message.startswith("1 conversation is longer than max_length 128")
    assert refused.value.message.endswith("line 11")


def test_turns_that_the_template_refuses_are_named_by_line_and_in_its_own_words(tmp_path: Path) -> None:
    strict = (
        "{%- for m in messages %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('roles must alternate') }}{%- endif %}{%- endfor %}"
    )
    rows = [conversation(1), {"messages": [_MESSAGES[1], *_MESSAGES]}, conversation(2)]
    path = write_dataset(tmp_path / "d.jsonl", rows)
    template = ChatTemplate(make_tokenizer(strict + CHATML))
    with pytest.raises(TrainingFailed) as refused:
        gather(path, None, Hyperparameters(validation_fraction=0), template, context_length=2048)
    assert refused.value.code == "dataset_invalid" and "line 2" in refused.value.message
    assert "the model's chat template refuses it: roles must alternate" in refused.value.message
    assert refused.value.hint == "let user and assistant alternate, beginning with the user"


def test_statistics_say_what_is_trained_on(tmp_path: Path) -> None:
    corpus = _gather(write_conversations(tmp_path / "d.jsonl", 20))
    numbers = corpus.statistics()
    assert numbers["tokens_min"] <= numbers["tokens_median"] <= numbers["tokens_p95"] <= numbers["tokens_max"]
    assert 0 < numbers["trained_share"] < 1
    assert 0 < corpus.trained_tokens < corpus.train_tokens
