"""Turns a text with known answers into tokens and labels, and proves that their borders are those of the prompts.

A server makes tokens of the prompt alone. In training the prompt is followed by the answer, and a tokenizer may join
the two (`\\n` and `\\n`): the model would then learn a token that it never has to produce. So the tokens before an
answer must be the prompt's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.data.example import IGNORED

# A border is compared from the last control token before it, which ends what a tokenizer can join. Where there is none
# within this many tokens, joining from further back is not to be expected.
_LOOK_BACK = 64
_MUST_AGREE = 8


@dataclass(frozen=True)
class Trained:
    """The characters from `begin` to `end` carry loss, then one token more if `stop` is given.

    The text goes on after `end` with something else where another turn follows. `turns`: of the conversation, shown
    by then.
    """

    begin: int
    end: int
    stop: int | None
    turns: int


@dataclass(frozen=True)
class Labelled:
    input_ids: list[int]
    labels: list[int]
    cuts: tuple[tuple[int, int], ...]


class Labeller:
    """Makes tokens and labels with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)
        # Tokenizers that put a space before a text's first word do not put it after a control token.
        self._anchor = tokenizer.eos_token or tokenizer.bos_token or ""

    def whole(self, text: str, parts: Sequence[Trained]) -> Labelled | None:
        """Labels the text's own tokens. None if a border is inside a token, or is another than the prompt's."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        labels = [IGNORED] * len(ids)
        cuts = []
        position = 0
        for part in parts:
            while position < len(ids) and offsets[position][1] <= part.begin:
                position += 1
            if not self._is_border(text, ids, offsets, position, part.begin):
                return None
            while position < len(ids) and offsets[position][0] < part.end:
                labels[position] = ids[position]
                position += 1
            if position and offsets[position - 1][1] > part.end:
                return None
            if part.stop is not None:
                if position == len(ids):
                    ids.append(part.stop)
                    labels.append(part.stop)
                else:
                    labels[position] = part.stop
            cuts.append((part.turns, position + (part.stop is not None)))
        return Labelled(ids, labels, tuple(cuts))

    def in_pieces(self, text: str, parts: Sequence[Trained]) -> Labelled:
        """Makes tokens of each piece alone, as when prompt and answer are tokenised one after the other."""
        ids: list[int] = []
        labels: list[int] = []
        cuts = []
        done = 0
        for part in parts:
            context, answer = self._piece(text[done : part.begin]), self._piece(text[part.begin : part.end])
            stop = [] if part.stop is None else [part.stop]
            ids += [*context, *answer, *stop]
            labels += [*([IGNORED] * len(context)), *answer, *stop]
            cuts.append((part.turns, len(ids)))
            done = part.end
        return Labelled(ids, labels, tuple(cuts))

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _piece(self, text: str) -> list[int]:
        if not text:
            return []
        return self.tokens(self._anchor + text)[1:] if self._anchor else self.tokens(text)

    def _is_border(
        self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], position: int, border: int
    ) -> bool:
        """True if the prompt alone, up to `border`, has exactly the tokens before `position`."""
        if position == 0:
            return border == 0
        if position < len(ids) and offsets[position][0] < border:
            return False
        first = max(0, position - _LOOK_BACK)
        control = next((index for index in range(position - 1, first - 1, -1) if ids[index] in self._added), None)
        start = first if control is None else control
        alone = self.tokens(text[offsets[start][0] : border])
        known = list(ids[start:position])
        return alone == known or (control is None and start > 0 and alone[-_MUST_AGREE:] == known[-_MUST_AGREE:])
