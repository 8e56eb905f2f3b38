"""What ends an answer: the mark that the template writes, and the token at which a server stops generating.

They are one and the same in most templates. GLM-4.5 writes no mark and stops at the next turn's `<|user|>`; gpt-oss
ends earlier answers with a mark at which no server stops; a base model with a borrowed template stops at its own end
of text only. A model that is not trained to produce the token that stops it never stops.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.data.template.rendering import MARK, Message, Renderer, TemplateRefuses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ending:
    """`text`: what the template writes that is trained. `stop`: a token to train after it, which it does not write."""

    text: str
    stop: int | None = None


@dataclass(frozen=True)
class TurnEnd:
    """How answers end in this template.

    `tail` is all that it writes after the last answer. `stop`: the token that stops a server. `marks`: the texts of all
    tokens that end an answer.
    """

    last: Ending
    earlier: Ending
    tail: str
    stop: int
    marks: tuple[str, ...]

    @property
    def is_written(self) -> bool:
        """False if the token that stops a server had to be added to what the template writes."""
        return self.last.stop is None


def find_turn_end(render: Renderer, tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> TurnEnd | None:
    """Finds it from two renderings. None if nothing ends an answer. `stops`: the tokens that end generation."""
    asked = (Message("user", "q"), Message("assistant", f"{MARK}a"))
    try:
        tail = render(asked).rpartition(f"{MARK}a")[2]
        between = render((*asked, Message("user", f"{MARK}b"))).rpartition(f"{MARK}a")[2].partition(f"{MARK}b")[0]
    except TemplateRefuses:
        # It takes special conversations only, and says of each other one what it wants.
        tail = between = ""
    last, earlier = _Tail(tokenizer, tail, stops), _Tail(tokenizer, between, stops)
    # Compare tokens, not characters: `<|user|>` and `<|end|>` begin with the same characters.
    shared = common_prefix(last.ids, earlier.ids)
    stop = tokenizer.eos_token_id
    stop = stop if isinstance(stop, int) else min(stops, default=None)

    def end(here: Ending, there: Ending, stop: int) -> TurnEnd:
        return TurnEnd(here, there, tail, stop, _texts(tokenizer, {*stops, stop}))

    known = last.first(stops, shared)
    if known is not None:
        both = Ending(last.through(known))
        return end(both, both, last.ids[known])
    mark = last.last_special(shared)
    if mark is not None:
        # The template's own mark, at which no server stops: after it, the token at which one does.
        both = Ending(last.through(mark), stop)
        return end(both, both, last.ids[mark] if stop is None else stop)
    plain = last.through(shared - 1).rstrip()
    known = last.first(stops)
    if known is not None:
        # gpt-oss: only the last answer ends as a generated one does.
        return end(Ending(last.through(known)), Ending(plain, last.ids[known]), last.ids[known])
    known = earlier.first(stops)
    if known is not None and not earlier.through(known - 1).strip():
        # GLM-4.5: the next turn's first token stops the server.
        return end(Ending("", earlier.ids[known]), Ending(earlier.through(known)), earlier.ids[known])
    if stop is None:
        return None
    both = Ending(plain, stop)
    return end(both, both, stop)


def _texts(tokenizer: Any, tokens: Collection[int]) -> tuple[str, ...]:
    known = (tokenizer.convert_ids_to_tokens(token) for token in tokens if token < len(tokenizer))
    # The longest first: one may be the end of another.
    return tuple(sorted((text for text in known if text and text.strip()), key=len, reverse=True))


class _Tail:
    """What follows an answer, as tokens."""

    def __init__(self, tokenizer: Any, text: str, stops: Collection[int]) -> None:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        self.text = text
        self.ids: list[int] = encoded["input_ids"]
        self._ends = [end for _start, end in encoded["offset_mapping"]]
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
            stops
        )

    def first(self, wanted: Collection[int], below: int | None = None) -> int | None:
        return next((index for index, token in enumerate(self.ids[:below]) if token in wanted), None)

    def last_special(self, below: int) -> int | None:
        return next((index for index in reversed(range(below)) if self.ids[index] in self._special), None)

    def through(self, index: int) -> str:
        return self.text[: self._ends[index]] if index >= 0 else ""


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    length = min(len(left), len(right))
    return next((index for index in range(length) if left[index] != right[index]), length)
