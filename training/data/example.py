"""One piece of training data: tokens, and labels that say which of them carry loss."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100  # PyTorch's cross entropy ignores such labels.


@dataclass(frozen=True)
class Example:
    """Token ids and equally many labels, IGNORED where no loss is wanted.

    A label differs from its token in one place only: where the template goes on with the next turn but a server stops,
    the label is the token that it stops at. `cuts`: after each answer, how many turns of the conversation have been
    shown and how many tokens that took; a conversation that is too long is cut at one of them.
    """

    input_ids: list[int]
    labels: list[int]
    place: str
    cuts: tuple[tuple[int, int], ...] = ()

    @property
    def trained_tokens(self) -> int:
        # Nothing comes before the first token, so it cannot be predicted.
        return sum(label != IGNORED for label in self.labels[1:])
