"""How long conversations may be, and what becomes of longer ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.data.chat_template import ChatTemplate, Encoded
from training.data.example import Example
from training.data.formats.conversation import Conversation
from training.data.formats.faults import invalid, join_places
from training.data.remarks import Remark, counted
from training.data.template.rendering import CannotEncode

# Sequences are padded to a multiple of this, so a length in between saves nothing.
LENGTH_STEP = 64
# As long as the data need, up to this: a conversation of 32,768 tokens beside the default model takes 60 of one GPU's
# 80 GB by the estimate. It is the same on every host, so that another one resumes with the same data.
DEFAULT_LENGTH_CAP = 32_768


def longest_possible(asked: int | None, context_length: int) -> int:
    """Returns the most tokens that an example may have, whatever the data are."""
    return min(asked if asked is not None else DEFAULT_LENGTH_CAP, context_length)


def choose_length(longest: int, asked: int | None, context_length: int) -> int:
    """Returns the requested length, or else what the data need; never more than the model reads."""
    needed = -(-longest // LENGTH_STEP) * LENGTH_STEP
    return min(asked if asked is not None else min(needed, DEFAULT_LENGTH_CAP), context_length)


@dataclass(frozen=True)
class Lost:
    """What does not fit: conversations that were cut, those that were left out, and the answers of both."""

    cut: int = 0
    left_out: int = 0
    answers: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.cut + other.cut, self.left_out + other.left_out, self.answers + other.answers)

    @property
    def conversations(self) -> int:
        return self.cut + self.left_out


def fit(
    encoded: Sequence[Encoded], conversations: Sequence[Conversation], template: ChatTemplate, max_length: int
) -> tuple[list[Example], Lost]:
    """Cuts long conversations after the last answer that fits; leaves out those whose first answer does not."""
    kept: list[Example] = []
    lost = Lost()
    for row, conversation in zip(encoded, conversations, strict=True):
        fitting = [example for example in row.examples if len(example.input_ids) <= max_length]
        if len(fitting) < len(row.examples):
            if not fitting:
                fitting = _cut_at_answer(row.examples[0], conversation, template, max_length)
            answers = sum(turn.trained for turn in conversation.turns) - sum(len(example.cuts) for example in fitting)
            lost += Lost(cut=int(bool(fitting)), left_out=int(not fitting), answers=answers)
        kept += fitting
    return kept, lost


def _cut_at_answer(
    example: Example, conversation: Conversation, template: ChatTemplate, max_length: int
) -> list[Example]:
    """Encodes the conversation again up to its last answer that fits.

    One attempt is mostly enough: a template writes a little more after the last answer than after an earlier one.
    """
    for turns, tokens in reversed(example.cuts[:-1]):
        if tokens > max_length:
            continue
        shorter = replace(conversation, turns=conversation.turns[:turns])
        try:
            examples = template.encode(shorter, max_length).examples
        except CannotEncode:
            continue
        fitting = [one for one in examples if len(one.input_ids) <= max_length and one.trained_tokens]
        if fitting:
            return fitting
    return []


def refuse_long(encoded: Sequence[Encoded], max_length: int, longest: int) -> None:
    """Raises TrainingFailed(dataset_invalid) naming the conversations that are too long."""
    places = [
        row.examples[0].place for row in encoded if any(len(example.input_ids) > max_length for example in row.examples)
    ]
    if places:
        raise invalid(
            f"{counted(len(places), 'conversation')} longer than max_length {max_length} (the longest has {longest} "
            f"tokens): {join_places(places)}",
            "raise max_length, shorten these conversations, or set long_conversations to cut",
        )


def remark_on_lost(lost: Lost, answers: int, max_length: int, longest: int, context_length: int) -> Remark:
    what = [f"{counted(lost.cut, 'conversation')} cut after an earlier answer"] if lost.cut else []
    if lost.left_out:
        what.append(f"{counted(lost.left_out, 'conversation')} left out since not even the first answer fits")
    advice = (
        f"to use all of them, set max_length to {longest}"
        if longest <= context_length
        else f"this model reads up to {context_length} tokens: split the conversations that are longer"
    )
    return Remark(
        "long_conversations",
        f"max_length is {max_length} tokens: {' and '.join(what)}, so that {lost.answers:,} of {answers:,} answers are "
        f"not used; {advice}",
        {
            "cut": lost.cut,
            "left_out": lost.left_out,
            "max_length": max_length,
            "answers": answers,
            "answers_left_out": lost.answers,
        },
    )
