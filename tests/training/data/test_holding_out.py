"""Held out by conversation: nothing that the validation measures was trained on, whatever the format."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.app_data import (
    FORMATS,
    AppConversation,
    AppFormat,
    app_conversations,
    app_pairs,
    write_app_data,
)
from tests.tiny_models import CHATML, conversation, make_tokenizer, write_conversations, write_dataset
from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus, gather
from training.data.example import IGNORED
from training.data.formats.conversation import Conversation, Turn
from training.data.formats.read_dataset import read_conversations
from training.data.holding_out import answers_of, hold_out
from training.spec import Hyperparameters

# A template that trims, as many do.
TRIMMING = CHATML.replace("message['content']", "(message['content'] | trim)")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(make_tokenizer(TRIMMING))


Gather = Callable[..., Corpus]


@pytest.fixture
def gathered(template: ChatTemplate) -> Gather:
    def of(path: Path, validation: Path | None = None, **chosen: Any) -> Corpus:
        return gather(path, validation, Hyperparameters.model_validate(chosen), template, context_length=8192)

    return of


def _said(rows: Sequence[Conversation]) -> set[str]:
    """All questions and answers, whether trained on or context."""
    return {turn.content.strip() for row in rows for turn in row.turns if turn.role != "system"}


def _remark(corpus: Corpus, code: str) -> dict[str, Any] | None:
    return next((remark.data for remark in corpus.remarks if remark.code == code), None)


def _ends_of_answers(examples: Sequence[Any]) -> set[tuple[int, ...]]:
    return {tuple(example.input_ids[:end]) for example in examples for _, end in answers_of(example)}


@pytest.mark.parametrize("count", [4, 7, 20, 60])
@pytest.mark.parametrize("format_", FORMATS)
def test_no_answer_and_no_history_of_a_held_out_example_is_trained_on(
    format_: AppFormat, count: int, tmp_path: Path
) -> None:
    rows = read_conversations(write_app_data(tmp_path / "data", format_, count)).conversations
    held_out = set()
    for seed in range(8):
        sides = hold_out(rows, 0.1, seed)
        assert sides.train and sides.validation
        assert not _said(sides.train) & _said(sides.validation)
        assert len(sides.train) + len(sides.validation) == len(rows)
        conversations = {sides.validation_groups[row.place] for row in sides.validation}
        assert len(conversations) == max(1, round(0.1 * count))
        held_out.add(frozenset(_said(sides.validation)))
    assert len(held_out) > 1


@pytest.mark.parametrize("format_", FORMATS)
def test_how_many_conversations_and_answers_are_held_out_is_counted(
    format_: AppFormat, tmp_path: Path, gathered: Gather
) -> None:
    spoken = app_conversations(12)
    corpus = gathered(write_app_data(tmp_path / "data", format_, spoken), validation_fraction=0.25)
    sides = corpus.sides()
    assert (sides["train_conversations"], sides["validation_conversations"]) == (9, 3)
    assert sides["train_answers"] + sides["validation_answers"] == sum(len(each.answers) for each in spoken)
    # The first prompts of three conversations, not three of one.
    assert len({row.turns[1 if row.turns[0].role == "system" else 0] for row in corpus.held_out}) == 3
    assert not _ends_of_answers(corpus.train) & _ends_of_answers(corpus.validation)


def test_every_format_holds_out_the_same_share_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = list(read_conversations(write_app_data(tmp_path / "data", "pairs", 30)).conversations)
    held_out = _said(hold_out(rows, 0.1, 3).validation)
    random.Random(0).shuffle(rows)
    assert _said(hold_out(rows, 0.1, 3).validation) == held_out
    assert _said(hold_out(rows, 0.1, 4).validation) != held_out


def test_pairs_without_an_id_are_told_by_their_histories(tmp_path: Path) -> None:
    pairs = [pair for spoken in app_conversations(30) for pair in app_pairs(spoken)]
    for pair in pairs:
        del pair["conversation_id"]
    random.Random(0).shuffle(pairs)
    for kept in (None, 4, 2):
        # An export may keep only the last entries: then no pair begins as the one before it.
        cut = [dict(pair) for pair in pairs]
        for pair in cut:
            pair["conversation_history"] = pair["conversation_history"][:-1][-kept if kept else None :]
        rows = read_conversations(write_dataset(tmp_path / "pairs.jsonl", cut)).conversations
        for seed in range(4):
            sides = hold_out(rows, 0.1, seed)
            assert not _said(sides.train) & _said(sides.validation), kept
            assert 2 <= len({sides.validation_groups[row.place] for row in sides.validation}) <= 3, kept


@pytest.mark.parametrize("format_", FORMATS)
def test_a_conversation_lands_with_the_one_that_it_begins_and_with_its_copies(
    format_: AppFormat, tmp_path: Path
) -> None:
    spoken = app_conversations(12)
    beginnings = [spoken[number].beginning(1 + number % 3) for number in range(6)]
    copies = [replace(spoken[number], id=f"again-{number}") for number in range(4, 8)]
    rows = read_conversations(write_app_data(tmp_path / "data", format_, [*copies, *spoken, *beginnings])).conversations
    for seed in range(8):
        sides = hold_out(rows, 0.25, seed)
        assert not _said(sides.train) & _said(sides.validation)
        assert len({sides.validation_groups[row.place] for row in sides.validation}) == 3
        # A copy in the validation would count twice.
        assert len({row.key() for row in sides.validation}) == len(sides.validation)


def _greeted(spoken: AppConversation) -> AppConversation:
    greeting = ("Hi", "Hello, I am Elena Morales of Pathways. What would you like to talk about today?")
    return replace(spoken, exchanges=(greeting, *spoken.exchanges))


@pytest.mark.parametrize("someone_left", [False, True])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_greeting_in_common_ties_nothing_and_does_not_count(
    format_: AppFormat, someone_left: bool, tmp_path: Path, gathered: Gather
) -> None:
    spoken = [_greeted(each) for each in app_conversations(20)]
    if someone_left:
        spoken[3] = spoken[3].beginning(1)
    corpus = gathered(write_app_data(tmp_path / "data", format_, spoken))
    # Of one who left after the greeting nothing is left to measure.
    assert 2 - someone_left <= corpus.validation_conversations <= 2
    assert not _ends_of_answers(corpus.train) & _ends_of_answers(corpus.validation)
    learnt = _remark(corpus, "held_out_answers_learnt")
    assert learnt is not None and learnt["answers"] >= 1


def test_a_conversation_that_outweighs_the_others_stays_in_training() -> None:
    long = [_row(f"long {number}", conversation_id="long") for number in range(200)]
    short = [_row(f"short {number}") for number in range(20)]
    for seed in range(8):
        sides = hold_out([*long, *short], 0.1, seed)
        assert len(sides.validation) == 2 and all(row.conversation_id is None for row in sides.validation)


@pytest.mark.parametrize(
    ("conversations", "fraction", "held_out"), [(1, 0.5, 0), (2, 0.5, 1), (3, 0.1, 0), (4, 0.1, 1), (4, 0.0, 0)]
)
def test_of_few_conversations_one_is_held_out_from_four_on(conversations: int, fraction: float, held_out: int) -> None:
    rows = [_row(f"{which} {number}", conversation_id=str(which)) for which in range(conversations) for number in "abc"]
    sides = hold_out(rows, fraction, seed=0)
    assert len(sides.validation) == 3 * held_out and len(sides.train) == len(rows) - 3 * held_out


def _row(text: str, conversation_id: str | None = None) -> Conversation:
    turns = (Turn("user", f"{text}?", trained=False), Turn("assistant", f"{text}!", trained=True))
    return Conversation(turns, text, conversation_id)


# --- a given validation file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
def test_what_a_validation_file_shares_with_the_training_data_is_left_out_and_said(
    format_: AppFormat, tmp_path: Path, gathered: Gather
) -> None:
    spoken = app_conversations(10)
    train = write_app_data(tmp_path / "train", "pairs", spoken[:8])
    # Conversation 5 as it was, the beginning of 6, 7 as it went on later, and two new ones, in any other format.
    later = replace(spoken[7], exchanges=(*spoken[7].exchanges, ("Now I know more, thank you.", "That is good news.")))
    given = [spoken[5], spoken[6].beginning(2), later, spoken[8], spoken[9]]
    corpus = gathered(train, write_app_data(tmp_path / "validation", format_, given))
    assert corpus.validation_conversations == 2
    assert not _ends_of_answers(corpus.train) & _ends_of_answers(corpus.validation)
    data = _remark(corpus, "validation_overlap")
    assert data == {"conversations": 3, "answers": 4 + 2 + 5}


def test_pairs_of_one_conversation_divided_between_the_files_overlap(tmp_path: Path, gathered: Gather) -> None:
    pairs = [pair for spoken in app_conversations(8) for pair in app_pairs(spoken) if pair["target_response"]]
    train = write_dataset(tmp_path / "train", [*pairs[0:20:2], *app_pairs(app_conversations(1, seed=1)[0])])
    corpus = gathered(train, write_dataset(tmp_path / "validation", pairs[1::2]))
    shared = _remark(corpus, "validation_overlap")
    assert shared is not None and shared["conversations"] == 5
    assert corpus.validation_conversations == 3


def test_equal_ids_in_two_files_are_no_overlap(tmp_path: Path, gathered: Gather) -> None:
    train = [replace(each, id=str(each.number)) for each in app_conversations(8)]
    given = [replace(each, id=str(each.number)) for each in app_conversations(4, seed=1)]
    paths = write_app_data(tmp_path / "t", "pairs", train), write_app_data(tmp_path / "v", "pairs", given)
    corpus = gathered(*paths)
    assert corpus.validation_conversations == 4 and _remark(corpus, "validation_overlap") is None


def test_a_validation_file_that_is_the_training_file_measures_nothing(tmp_path: Path, gathered: Gather) -> None:
    path = write_conversations(tmp_path / "d.jsonl", 5)
    corpus = gathered(path, path)
    assert not corpus.validation and len(corpus.train) == 5
    assert _remark(corpus, "validation_overlap") == {"conversations": 5, "answers": 5}
    assert _remark(corpus, "no_validation") == {}


def test_what_is_odd_in_a_validation_file_is_said_as_well(tmp_path: Path, gathered: Gather) -> None:
    validation = write_app_data(tmp_path / "v", "pairs", 5, seed=1)
    corpus = gathered(write_app_data(tmp_path / "t", "messages", 5), validation)
    said = [remark.message for remark in corpus.remarks if remark.code == "repeated_in_history"]
    assert said == [
        "validation file: the history of 19 pairs ends with current_user_input: the question is asked only once"
    ]


# --- what is learnt, not what was written -----------------------------------------------------------------------------


def test_forked_conversations_that_are_cut_to_one_beginning_stand_on_one_side(tmp_path: Path, gathered: Gather) -> None:
    """Each pair of forks has the first exchange in common and goes on too long for max_length."""
    rows = []
    for number in range(20):
        first = conversation(number // 2)["messages"]
        ending = conversation(100 + number, exchanges=6)["messages"]
        rows.append({"messages": [*first, *ending]})
    seen = 0
    for seed in range(4):
        corpus = gathered(write_dataset(tmp_path / "d.jsonl", rows), max_length=96, validation_fraction=0.3, seed=seed)
        assert not _ends_of_answers(corpus.train) & _ends_of_answers(corpus.validation)
        seen += (_remark(corpus, "held_out_answers_learnt") or {"answers": 0})["answers"]
    assert seen > 0


def test_only_the_answers_that_are_learnt_lose_their_labels(tmp_path: Path, gathered: Gather) -> None:
    shared = conversation(0)["messages"]
    train = [{"messages": [*shared, *conversation(number)["messages"]]} for number in (1, 2)]
    # As written it differs: the template trims it.
    begun = [shared[0], {"role": "assistant", "content": shared[1]["content"] + "\n"}]
    given = [{"messages": [*begun, *conversation(3)["messages"]]}]
    corpus = gathered(write_dataset(tmp_path / "t.jsonl", train), write_dataset(tmp_path / "v.jsonl", given))
    (example,) = corpus.validation
    ((start, end),) = answers_of(example)
    assert IGNORED not in example.labels[start:end]
    assert _remark(corpus, "held_out_answers_learnt") == {"answers": 1}
    assert corpus.sides()["validation_answers"] == 1
