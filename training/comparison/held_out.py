"""On which conversations a comparison measures the loss: what each job held out, and what none of them was trained on.

A loss compares only with a loss on the same text. So there are two kinds of sets:

- a job's *own* set is what its training held out: the base model and its adapter are measured on it. It is the set of
  the validation loss in the job's row.
- the *common* set is the same for the base model and all adapters: what any of the jobs held out (or the conversations
  of a given file), without what any of them was trained on.

Of an adapter whose data are not known, nobody can tell whether it was trained on the common set: it is named.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.comparison.request import Request
from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus, gather
from training.data.encoding import encode
from training.data.example import Example
from training.data.fitting import choose_length, fit, longest_possible
from training.data.formats.conversation import Conversation
from training.data.formats.read_dataset import read_conversations
from training.data.holding_out import answers_of, hold_out, leave_out_learnt, leave_out_trained
from training.failures import TrainingFailed
from training.spec import Hyperparameters

COMMON = "common"
Note = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """Conversations to measure a loss on. Equal digests mean equal tokens."""

    examples: tuple[Example, ...]
    rows: tuple[Conversation, ...]

    @property
    def answers(self) -> int:
        return sum(1 for example in self.examples for _ in answers_of(example))

    @property
    def tokens(self) -> int:
        return sum(example.trained_tokens for example in self.examples)

    @property
    def digest(self) -> str:
        seen = hashlib.sha256()
        for example in self.examples:
            seen.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        return seen.hexdigest()[:12]


@dataclass(frozen=True)
class Sets:
    """`own` by the contestant's place in the request; `unknown`: the contestants whose data are not known."""

    own: dict[int, HeldOut]
    common: HeldOut
    unknown: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Trained:
    """What one contestant was trained on, and what it held out."""

    corpus: Corpus
    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]

    @property
    def own(self) -> HeldOut:
        return HeldOut(self.corpus.validation, self.corpus.held_out)


def find_sets(request: Request, template: ChatTemplate, context_length: int, note: Note) -> Sets:
    """Divides each job's data as its training did. A job whose data cannot be read is noted, and its set unknown."""
    known: dict[int, _Trained] = {}
    read: dict[tuple[object, ...], _Trained] = {}
    for place, contestant in enumerate(request.contestants):
        if contestant.dataset is None or contestant.hyperparameters is None:
            continue
        dataset, chosen = contestant.dataset, contestant.hyperparameters
        # All that the division depends on.
        of = (dataset, chosen.seed, chosen.validation_fraction, chosen.max_length, chosen.long_conversations)
        try:
            known[place] = read[of] = read.get(of) or _divide(dataset, chosen, template, context_length)
        except TrainingFailed as error:
            note(f"the data of {contestant.name} cannot be read as its training read them: {error.message}")
    unknown = tuple(place for place in range(len(request.contestants)) if place not in known)
    own = {place: trained.own for place, trained in known.items() if trained.own.examples}
    everything = list(read.values())
    if request.held_out is not None:
        given = read_conversations(request.held_out).conversations
        common = _unseen(
            given, _first_of_each(given), everything, template=template, context_length=context_length, note=note
        )
    elif len(everything) == 1:
        common = everything[0].own
    else:
        rows = _different(row for trained in everything for row in trained.validation)
        first = _different(row for trained in everything for row in trained.corpus.held_out)
        common = _unseen(rows, first, everything, template=template, context_length=context_length, note=note)
    return Sets(own, common, unknown)


def _divide(dataset: Path, chosen: Hyperparameters, template: ChatTemplate, context_length: int) -> _Trained:
    corpus = gather(dataset, None, chosen, template, context_length)
    sides = hold_out(read_conversations(dataset).conversations, chosen.validation_fraction, chosen.seed)
    return _Trained(corpus, sides.train, sides.validation)


def _unseen(
    rows: Sequence[Conversation],
    first_rows: Sequence[Conversation],
    everything: Sequence[_Trained],
    *,
    template: ChatTemplate,
    context_length: int,
    note: Note,
) -> HeldOut:
    """Returns those of `rows` that none of these was trained on, neither as conversations nor as tokens."""
    kept = list(rows)
    for trained in everything:
        kept = list(leave_out_trained(trained.train, kept).validation)
    if len(kept) < len(rows):
        note(
            f"{len(rows) - len(kept)} of {len(rows)} held-out conversations are left out of the common set: "
            "one of the jobs was trained on them"
        )
    if not kept:
        return HeldOut((), ())
    asked = max((trained.corpus.max_length for trained in everything), default=None)
    encoded = encode(kept, template, longest_possible(asked, context_length), lambda _done, _total: None)
    longest = max(len(example.input_ids) for row in encoded for example in row.examples)
    examples, _ = fit(encoded, kept, template, choose_length(longest, asked, context_length))
    for trained in everything:
        examples, _ = leave_out_learnt(trained.corpus.train, examples)
    places = {example.place for example in examples}
    keys = {row.key() for row in kept if row.place in places}
    return HeldOut(tuple(examples), tuple(row for row in first_rows if row.key() in keys))


def _different(rows: Iterable[Conversation]) -> list[Conversation]:
    found: dict[str, Conversation] = {}
    for row in rows:
        found.setdefault(row.key(), row)
    return list(found.values())


def _first_of_each(rows: Sequence[Conversation]) -> list[Conversation]:
    """Of the rows of one conversation, the first."""
    found: dict[str, Conversation] = {}
    for row in rows:
        found.setdefault(row.conversation_id or row.key(), row)
    return list(found.values())
