"""Decides which conversations are held out for validation: whole conversations, never single pairs of one.

A pair's history holds the answers of the pairs before it. Held out one by one, nearly every pair would be in the
training data as well, and the validation loss would measure memory. So rows that share text are one *group*, and a
group is on one side. Rows are in one group if

- they carry one `conversation_id` (in a `brightrun-lora-v4` document: stand in one conversation of it),
- the whole conversation of one is the beginning of another, or its copy,
- without an id, one's question and answer stand in the history of another (an export that cuts long histories).

What conversations have in common all the same (a greeting, an opening question) must not count either: once the text is
tokens, held-out answers that training examples begin with too lose their labels.

Time grows with the text and no faster: beginnings are compared by their hashes.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median_low

from training.data.example import IGNORED, Example
from training.data.formats.conversation import Conversation, Turn

# With fewer groups, holding one out costs more than its loss tells.
_FEWEST_GROUPS = 4
# Different conversations have shorter answers in common: small talk ("You're welcome."), labels ("positive").
_TELLING_CHARACTERS = 40


@dataclass(frozen=True)
class Sides:
    """The rows of each side, in the order of the file, and the group of every row by its place.

    A copy of a held-out row is on neither side. `dropped` are rows of a given validation file that are trained on.
    """

    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]
    train_groups: dict[str, int]
    validation_groups: dict[str, int]
    dropped: tuple[Conversation, ...] = ()


def hold_out(conversations: Sequence[Conversation], fraction: float, seed: int) -> Sides:
    """Holds out a fraction of the groups: the same ones on every host and in every attempt.

    The seed decides by content, not by order. Of four groups at least one is held out. A group that would take the rows
    held out above twice the fraction stays in training.
    """
    groups = _groups(conversations)
    digests = [hashlib.sha256(conversation.key().encode()).digest() for conversation in conversations]
    members: dict[int, set[bytes]] = {}
    for digest, group in zip(digests, groups, strict=True):
        members.setdefault(group, set()).add(digest)
    chosen = _choose(members, fraction, seed)
    train: list[Conversation] = []
    validation: dict[bytes, Conversation] = {}
    for conversation, digest, group in zip(conversations, digests, groups, strict=True):
        if group in chosen:
            validation.setdefault(digest, conversation)
        else:
            train.append(conversation)
    of_place = _by_place(conversations, groups)
    return Sides(tuple(train), tuple(validation.values()), of_place, of_place)


def leave_out_trained(train: Sequence[Conversation], validation: Sequence[Conversation]) -> Sides:
    """Leaves out of a given validation file what is in one group with a row of the training data.

    Ids count only together with the first words: two files may both number their conversations from 1.
    """
    groups = _groups([*train, *validation], two_files=True)
    of_train, of_validation = groups[: len(train)], groups[len(train) :]
    trained = set(of_train)
    kept: list[Conversation] = []
    dropped: list[Conversation] = []
    for conversation, group in zip(validation, of_validation, strict=True):
        (dropped if group in trained else kept).append(conversation)
    return Sides(
        tuple(train), tuple(kept), _by_place(train, of_train), _by_place(validation, of_validation), tuple(dropped)
    )


def _by_place(conversations: Sequence[Conversation], groups: Sequence[int]) -> dict[str, int]:
    return {conversation.place: group for conversation, group in zip(conversations, groups, strict=True)}


def _choose(members: dict[int, set[bytes]], fraction: float, seed: int) -> set[int]:
    def rank(group: int) -> bytes:
        return hashlib.sha256(b"".join([f"{seed}\n".encode(), *sorted(members[group])])).digest()

    wanted = round(fraction * len(members))
    if fraction > 0 and len(members) >= _FEWEST_GROUPS:
        wanted = max(1, wanted)
    if not wanted:
        return set()
    in_order = sorted(members, key=rank)
    sizes = {group: len(rows) for group, rows in members.items()}
    room = min(2 * fraction, 0.5) * sum(sizes.values())
    chosen: set[int] = set()
    # Of few conversations each is larger than that. One of the smaller half is never most of the data.
    ordinary = median_low(sizes.values())
    for group in in_order:
        if len(chosen) < wanted and (sizes[group] <= room or (not chosen and sizes[group] <= ordinary)):
            chosen.add(group)
            room -= sizes[group]
    return chosen


def count_conversations(conversations: Sequence[Conversation]) -> int:
    """Counts different conversations, as `hold_out` divides them. Of pairs, many are one."""
    return len(set(_groups(conversations)))


def leave_out_learnt(train: Sequence[Example], validation: Sequence[Example]) -> tuple[list[Example], int]:
    """Takes the labels off held-out answers that a training example begins with, context and all; counts them.

    Texts that differ may become equal tokens: a template trims them, or forked conversations are cut to one beginning.
    """
    beginnings = sorted(_bytes_of(example) for example in train) if validation else []
    kept: list[Example] = []
    learnt = 0
    for example in validation:
        tokens = _bytes_of(example)
        size = len(tokens) // len(example.input_ids)
        labels = example.labels
        for start, end in answers_of(example):
            beginning = tokens[: end * size]
            at = bisect_left(beginnings, beginning)
            if at < len(beginnings) and beginnings[at].startswith(beginning):
                labels = [*labels[:start], *[IGNORED] * (end - start), *labels[end:]]
                learnt += 1
        if any(label != IGNORED for label in labels):
            kept.append(replace(example, labels=labels))
    return kept, learnt


def answers_of(example: Example) -> Iterator[tuple[int, int]]:
    """Yields the first and the last position (exclusive) of each run of tokens that carry loss."""
    start = None
    for position, label in enumerate(example.labels):
        if (label == IGNORED) == (start is not None):
            if start is not None:
                yield start, position
            start = None if start is not None else position
    if start is not None:
        yield start, len(example.labels)


def _bytes_of(example: Example) -> bytes:
    return array("l", example.input_ids).tobytes()


# --- groups -----------------------------------------------------------------------------------------------------------


def _groups(conversations: Sequence[Conversation], *, two_files: bool = False) -> list[int]:
    """Returns the number of each row's group: the position of one of its rows."""
    # What one exchange of two files has in common is left to leave_out_learnt.
    if two_files:
        return _join(conversations, two_files=True, questions=2)
    groups = _join(conversations, two_files=False, questions=1)
    if _is_most(groups):
        # One conversation that ended after a greeting ties all together that begin so. Then it does not.
        apart = _join(conversations, two_files=False, questions=2)
        return groups if _is_most(apart) else apart
    return groups


def _is_most(groups: Sequence[int]) -> bool:
    return 2 * max(Counter(groups).values()) > len(groups)


def _join(conversations: Sequence[Conversation], *, two_files: bool, questions: int) -> list[int]:
    """Joins the rows of one conversation, and conversations whose text begins alike up to the end of one of them.

    `questions`: how many a beginning holds at least."""
    names = [_name(conversation, two_files=two_files) for conversation in conversations]
    longest: dict[bytes, int] = {}
    for name, conversation in zip(names, conversations, strict=True):
        if name is not None:
            longest[name] = max(len(conversation.turns), longest.get(name, 0))
    union = _Union(len(conversations))
    owners: dict[bytes, int] = {}
    for index, (name, conversation) in enumerate(zip(names, conversations, strict=True)):
        if name is not None:
            union.join(index, owners.setdefault(name, index))
        if name is None or len(conversation.turns) == longest[name]:
            for mark in _whole(conversation, questions, told_by_text=name is None or two_files):
                union.join(index, owners.setdefault(mark, index))
    for index, (name, conversation) in enumerate(zip(names, conversations, strict=True)):
        for mark in _parts(conversation, questions, told_by_text=name is None or two_files):
            if mark in owners:
                union.join(index, owners[mark])
    return [union.find(index) for index in range(len(conversations))]


def _name(conversation: Conversation, *, two_files: bool) -> bytes | None:
    if conversation.conversation_id is None:
        return None
    first = next(turn for turn in conversation.turns if turn.role != "system")
    name = _hash(b"id", conversation.conversation_id)
    return _hash(name, first.content.strip()) if two_files else name


def _whole(conversation: Conversation, questions: int, *, told_by_text: bool) -> Iterator[bytes]:
    """Yields what stands for the whole text. Rows that yield the same are in one group."""
    turns = conversation.turns
    yield from (mark for end, _, mark in _beginnings(turns) if end == len(turns))
    if told_by_text and _is_pair(turns) and sum(turn.role == "user" for turn in turns) >= questions:
        yield from _exchange(turns[-2], turns[-1])


def _parts(conversation: Conversation, questions: int, *, told_by_text: bool) -> Iterator[bytes]:
    """Yields the same for each part of the text that could be a row of its own."""
    turns = conversation.turns
    yield from (mark for _, asked, mark in _beginnings(turns) if asked >= questions)
    if told_by_text and _is_pair(turns):
        for left, right in pairwise(turns[:-1]):
            yield from _exchange(left, right)


def _beginnings(turns: Sequence[Turn]) -> Iterator[tuple[int, int, bytes]]:
    """Yields each end of a beginning, its number of questions and its hash.

    From two questions on a second hash leaves the system text out: it may change within one conversation."""
    first = 1 if turns[0].role == "system" else 0
    with_system, without = (_hash(b"turns", turns[0].content.strip()) if first else b"turns"), b"turns"
    questions = 0
    for end, turn in enumerate(turns[first:], start=first + 1):
        said = f"{turn.role}\n{turn.content.strip()}"
        with_system = _hash(with_system, said)
        questions += turn.role == "user"
        yield end, questions, with_system
        if first:
            without = _hash(without, said)
            if questions > 1:
                yield end, questions, without


def _is_pair(turns: Sequence[Turn]) -> bool:
    return len(turns) > 1 and turns[-2].role == "user" and sum(turn.trained for turn in turns) == 1


def _exchange(question: Turn, answer: Turn) -> Iterator[bytes]:
    words = answer.content.strip()
    if question.role == "user" and answer.role == "assistant" and len(words) >= _TELLING_CHARACTERS:
        yield _hash(_hash(b"exchange", question.content.strip()), words)


def _hash(before: bytes, text: str) -> bytes:
    return hashlib.sha256(before + text.encode()).digest()


class _Union:
    """Disjoint sets of numbers: joins two, finds the one number that stands for a set."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first
