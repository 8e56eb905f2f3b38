"""Prepares the training data from files: encodes, cuts to length, splits and counts. Needs a tokenizer, no torch."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.chat_template import ChatTemplate
from training.data.encoding import Tick, encode
from training.data.example import Example
from training.data.fitting import choose_length, fit, longest_possible, refuse_long, remark_on_lost
from training.data.formats.conversation import Conversation
from training.data.formats.faults import invalid
from training.data.formats.read_dataset import Reading, read_conversations
from training.data.holding_out import Sides, answers_of, hold_out, leave_out_learnt, leave_out_trained
from training.data.remarks import Remark, remarks_on
from training.data.template_remarks import remarks_on_encoding
from training.failures import TrainingFailed
from training.spec import Hyperparameters

if TYPE_CHECKING:
    from training.event_writer import EventWriter


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
    *,
    tick: Tick = lambda _done, _total: None,
) -> Corpus:
    """Reads, encodes, cuts and splits. Raises TrainingFailed(dataset_invalid) with line numbers and reasons.

    `tick` is called every few seconds with how many conversations are encoded, and of how many.
    """
    reading = read_conversations(dataset_path)
    remarks = remarks_on(reading)
    sides = _divide(reading, validation_path, chosen, remarks)
    train_part, held_out = list(sides.train), list(sides.validation)
    rows = [*train_part, *held_out]
    template.suit(rows)
    encoded = encode(rows, template, longest_possible(chosen.max_length, context_length), tick)
    remarks += remarks_on_encoding(template, rows, encoded)
    longest = max(len(example.input_ids) for row in encoded for example in row.examples)
    max_length = choose_length(longest, chosen.max_length, context_length)
    if chosen.long_conversations == "refuse":
        refuse_long(encoded[: len(train_part)], max_length, longest)
    train, lost = fit(encoded[: len(train_part)], train_part, template, max_length)
    validation, lost_too = fit(encoded[len(train_part) :], held_out, template, max_length)
    if not train:
        raise invalid(
            f"no conversation fits into max_length {max_length} (the longest has {longest} tokens)",
            f"raise max_length (this model reads up to {context_length} tokens) or shorten the conversations",
        )
    if lost.conversations or lost_too.conversations:
        answers = sum(turn.trained for row in rows for turn in row.turns)
        remarks.append(remark_on_lost(lost + lost_too, answers, max_length, longest, context_length))
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
    given = _read_validation(validation_path, remarks)
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


def _read_validation(path: Path, remarks: list[Remark]) -> Reading:
    """Reads the given validation file; what is said of it names it, since lines of two files look alike."""
    try:
        given = read_conversations(path)
    except TrainingFailed as error:
        message = f"the validation file cannot be used: {error.message}"
        raise TrainingFailed(error.code, message, error.hint, transient=error.transient) from None
    remarks += [replace(said, message=f"validation file: {said.message}") for said in remarks_on(given)]
    return given
