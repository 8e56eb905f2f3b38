"""Prepares the training data from files: encodes, cuts to length, splits and counts. Needs a tokenizer, no torch."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.chat_template import ChatTemplate, Example, TemplateRefuses
from training.data.formats.conversation import Conversation
from training.data.formats.faults import invalid, join_places, list_faults
from training.data.formats.read_dataset import Reading, read_conversations
from training.data.holding_out import Sides, answers_of, hold_out, leave_out_learnt, leave_out_trained
from training.data.remarks import Remark, remarks_on
from training.spec import Hyperparameters

if TYPE_CHECKING:
    from training.event_writer import EventWriter

# Sequences are padded to a multiple of this, so a length in between saves nothing.
LENGTH_STEP = 64
# As long as the data need, up to this: a conversation of 32,768 tokens beside the default model takes 60 of one GPU's
# 80 GB by the estimate. It is the same on every host, so that another one resumes with the same data.
DEFAULT_LENGTH_CAP = 32_768


@dataclass(frozen=True)
class Corpus:
    """All training and validation data of a run.

    `held_out` has one row of each conversation on the validation side: of a conversation's pairs, the first."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Conversation, ...]
    max_length: int
    format: str
    remarks: tuple[Remark, ...]
    train_conversations: int = 0
    validation_conversations: int = 0

    @property
    def train_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.train)

    @property
    def trained_tokens(self) -> int:
        return sum(example.trained_tokens for example in self.train)

    @property
    def validation_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.validation)

    @property
    def train_answers(self) -> int:
        return sum(1 for example in self.train for _ in answers_of(example))

    @property
    def validation_answers(self) -> int:
        return sum(1 for example in self.validation for _ in answers_of(example))

    def sides(self) -> dict[str, int]:
        """Returns how much is trained on and how much is held out; of pairs, many belong to one conversation."""
        return {
            "train_conversations": self.train_conversations,
            "train_answers": self.train_answers,
            "validation_conversations": self.validation_conversations,
            "validation_answers": self.validation_answers,
        }

    def digest(self) -> str:
        """Returns the SHA-256 over the training and validation tokens: equal digests mean equal data."""
        seen = hashlib.sha256()
        for part in (self.train, self.validation):
            for example in part:
                seen.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
            seen.update(b"|")
        return seen.hexdigest()

    def statistics(self) -> dict[str, Any]:
        """Returns the tokens per conversation, as numbers that a dashboard can show."""
        lengths = sorted(len(example.input_ids) for example in self.train)
        return {
            "format": self.format,
            "tokens_min": lengths[0],
            "tokens_median": lengths[len(lengths) // 2],
            "tokens_p95": lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))],
            "tokens_max": lengths[-1],
            "trained_share": round(self.trained_tokens / max(1, self.train_tokens), 4),
        }

    def announce(self, voice: EventWriter) -> None:
        for remark in self.remarks:
            voice.notice(remark.code, remark.message, **remark.data)


def gather(
    dataset_path: Path,
    validation_path: Path | None,
    chosen: Hyperparameters,
    template: ChatTemplate,
    context_length: int,
) -> Corpus:
    """Reads, encodes, cuts and splits. Raises TrainingFailed(dataset_invalid) with line numbers and reasons."""
    reading = read_conversations(dataset_path)
    remarks = _remarks_on(reading, template)
    sides = _divide(reading, validation_path, chosen, remarks)
    train_part, held_out = list(sides.train), list(sides.validation)
    train = _encode(train_part, template)
    validation = _encode(held_out, template)
    longest = max(len(example.input_ids) for example in (*train, *validation))
    max_length = _choose_length(longest, chosen.max_length, context_length)
    if chosen.long_conversations == "refuse":
        _refuse_long(train, max_length, longest)
    train, lost = _fit(train, train_part, template, max_length)
    validation, lost_too = _fit(validation, held_out, template, max_length)
    if not train:
        raise invalid(
            f"no conversation fits into max_length {max_length} (the longest has {longest} tokens)",
            f"raise max_length (this model reads up to {context_length} tokens) or shorten the conversations",
        )
    if lost.conversations or lost_too.conversations:
        answers = sum(turn.trained for part in (train_part, held_out) for one in part for turn in one.turns)
        remarks.append(_remark_on_lost(lost + lost_too, answers, max_length, longest, context_length))
    validation, learnt = leave_out_learnt(train, validation)
    if learnt:
        remarks.append(
            Remark(
                "held_out_answers_learnt",
                f"{learnt} held-out answers are also trained on, word for word in the same context; "
                "they do not count in the validation loss",
                {"answers": learnt},
            )
        )
    if not validation and (validation_path is not None or chosen.validation_fraction > 0):
        remarks.append(
            Remark(
                "no_validation",
                "there are too few different conversations to hold any out; no validation loss is measured"
                if validation_path is None and not held_out
                else "nothing is left to measure a validation loss on; give other conversations for validation",
            )
        )
    kept = {sides.validation_groups[example.place] for example in validation}
    first_rows: dict[int, Conversation] = {}
    for row in held_out:
        first_rows.setdefault(sides.validation_groups[row.place], row)
    return Corpus(
        train=tuple(train),
        validation=tuple(validation),
        held_out=tuple(row for group, row in first_rows.items() if group in kept),
        max_length=max_length,
        format=reading.format,
        remarks=tuple(remarks),
        train_conversations=len({sides.train_groups[example.place] for example in train}),
        validation_conversations=len(kept),
    )


def _divide(reading: Reading, validation_path: Path | None, chosen: Hyperparameters, remarks: list[Remark]) -> Sides:
    """Returns the rows of each side; adds a remark on rows of a given validation file that are trained on."""
    if validation_path is None:
        return hold_out(reading.conversations, chosen.validation_fraction, chosen.seed)
    given = read_conversations(validation_path)
    remarks += [Remark(said.code, f"validation file: {said.message}", said.data) for said in remarks_on(given)]
    sides = leave_out_trained(reading.conversations, given.conversations)
    if sides.dropped:
        conversations = len({sides.validation_groups[row.place] for row in sides.dropped})
        answers = sum(turn.trained for row in sides.dropped for turn in row.turns)
        remarks.append(
            Remark(
                "validation_overlap",
                f"{conversations} conversations of the validation file ({answers} answers) are also trained on; "
                "they are left out of the validation, since their loss would only show that they were memorised",
                {"conversations": conversations, "answers": answers},
            )
        )
    return sides


def _remarks_on(reading: Reading, template: ChatTemplate) -> list[Remark]:
    remarks = remarks_on(reading)
    if template.is_default:
        remarks.append(
            Remark("default_template", "this model has no chat template; the default one is used and saved beside it")
        )
    if template.folds_system and any(turn.role == "system" for c in reading.conversations for turn in c.turns):
        remarks.append(
            Remark(
                "system_folded",
                "this model's chat template has no system role; system texts are put before the first user message",
            )
        )
    return remarks


def _encode(conversations: Sequence[Conversation], template: ChatTemplate) -> list[Example]:
    examples, faults = [], []
    for conversation in conversations:
        try:
            examples.append(template.encode(conversation))
        except TemplateRefuses as error:
            faults.append((conversation.place, f"the model's chat template refuses it: {error}"))
    if faults:
        raise invalid(
            f"{len(faults)} conversations cannot be rendered: {list_faults(faults)}",
            "let user and assistant alternate, beginning with the user",
        )
    return examples


def _choose_length(longest: int, asked: int | None, context_length: int) -> int:
    """Returns the requested length, or else what the data need; never more than the model reads."""
    needed = -(-longest // LENGTH_STEP) * LENGTH_STEP
    return min(asked if asked is not None else min(needed, DEFAULT_LENGTH_CAP), context_length)


@dataclass(frozen=True)
class _Lost:
    """What does not fit: conversations that were cut, those that were left out, and the answers of both."""

    cut: int = 0
    left_out: int = 0
    answers: int = 0

    def __add__(self, other: _Lost) -> _Lost:
        return _Lost(self.cut + other.cut, self.left_out + other.left_out, self.answers + other.answers)

    @property
    def conversations(self) -> int:
        return self.cut + self.left_out


def _fit(
    examples: Sequence[Example], conversations: Sequence[Conversation], template: ChatTemplate, max_length: int
) -> tuple[list[Example], _Lost]:
    """Cuts long conversations after the last answer that fits; leaves out those whose first answer does not."""
    kept: list[Example] = []
    lost = _Lost()
    for example, conversation in zip(examples, conversations, strict=True):
        if len(example.input_ids) <= max_length:
            kept.append(example)
            continue
        answers = sum(turn.trained for turn in conversation.turns)
        shorter = _cut_at_turn(conversation, template, max_length)
        if shorter is None:
            lost += _Lost(left_out=1, answers=answers)
        else:
            kept.append(shorter)
            lost += _Lost(cut=1, answers=answers - sum(1 for _ in answers_of(shorter)))
    return kept, lost


def _refuse_long(examples: Sequence[Example], max_length: int, longest: int) -> None:
    places = [example.place for example in examples if len(example.input_ids) > max_length]
    if places:
        count = "1 conversation is" if len(places) == 1 else f"{len(places):,} conversations are"
        raise invalid(
            f"{count} longer than max_length {max_length} (the longest has {longest} tokens): {join_places(places)}",
            "raise max_length, shorten these conversations, or set long_conversations to cut",
        )


def _remark_on_lost(lost: _Lost, answers: int, max_length: int, longest: int, context_length: int) -> Remark:
    what = [f"{lost.cut:,} cut after an earlier answer"] if lost.cut else []
    what += [f"{lost.left_out:,} left out because not even the first answer fits"] if lost.left_out else []
    advice = (
        f"to train on all of them, set max_length to {longest}"
        if longest <= context_length
        else f"this model reads up to {context_length} tokens: split the conversations that are longer"
    )
    return Remark(
        "long_conversations",
        f"of the conversations longer than max_length {max_length}, {' and '.join(what)}: {lost.answers:,} of "
        f"{answers:,} answers are not trained on; {advice}",
        {
            "cut": lost.cut,
            "left_out": lost.left_out,
            "max_length": max_length,
            "answers": answers,
            "answers_left_out": lost.answers,
        },
    )


def _cut_at_turn(conversation: Conversation, template: ChatTemplate, max_length: int) -> Example | None:
    for end in range(len(conversation.turns) - 1, 0, -1):
        turns = conversation.turns[:end]
        if not turns[-1].trained:
            continue
        try:
            example = template.encode(Conversation(turns, conversation.place))
        except TemplateRefuses:
            continue
        if len(example.input_ids) <= max_length and example.trained_tokens:
            return example
    return None
