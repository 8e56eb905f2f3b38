"""Counts who preferred which of two contestants, and says how far chance alone goes.

The test counts prompts, not votes: ten people who vote on one prompt have seen one pair of answers, not ten. Of each
prompt the majority counts; a prompt without one is a tie, and ties say nothing of who is better.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Choice = Literal["one", "two", "tie"]

# The 97.5th percentile of the normal distribution: 95 % lie within it on both sides.
_Z = 1.959964
# Below this, chance seldom does it.
_SELDOM = 0.05


@dataclass(frozen=True)
class Vote:
    """One choice about one prompt."""

    number: int
    choice: Choice


@dataclass(frozen=True)
class Tally:
    """Votes, and prompts by their majority."""

    votes: dict[Choice, int]
    prompts: dict[Choice, int]

    @property
    def decided(self) -> int:
        return self.prompts["one"] + self.prompts["two"]

    @property
    def p_value(self) -> float | None:
        """Of the two-sided sign test: how often chance alone would decide so many prompts so unevenly, or more."""
        if not self.decided:
            return None
        fewer = min(self.prompts["one"], self.prompts["two"])
        tail = sum(math.comb(self.decided, count) for count in range(fewer + 1))
        return min(1.0, float(Fraction(tail, 2**self.decided) * 2))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the share of `two` among decided prompts lies, with 95 % confidence (Wilson)."""
        if not self.decided:
            return None
        total, share = self.decided, self.prompts["two"] / self.decided
        spread = _Z / (1 + _Z**2 / total) * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
        centre = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
        return max(0.0, centre - spread), min(1.0, centre + spread)

    def in_words(self, one: str, two: str) -> str:
        """Says who was preferred, and whether that may be chance."""
        ties = self.prompts["tie"]
        tied = f"; {ties} tied" if ties else ""
        interval, p_value = self.interval, self.p_value
        if interval is None or p_value is None:
            return f"No prompt is decided{tied}."
        ahead, wins = (
            (two, self.prompts["two"]) if self.prompts["two"] >= self.decided / 2 else (one, self.prompts["one"])
        )
        low, high = interval if ahead == two else (1 - interval[1], 1 - interval[0])
        if wins * 2 == self.decided:
            said = f"{one} and {two} are preferred on {wins} prompts each{tied}."
        else:
            said = (
                f"{ahead} is preferred on {wins} of {self.decided} decided prompts, {100 * wins / self.decided:.0f} % "
                f"(95 % interval {100 * low:.0f} to {100 * high:.0f} %){tied}."
            )
        chance = "less than 0.1" if p_value < 0.001 else f"{100 * p_value:.{0 if p_value >= 0.01 else 1}f}"
        if p_value < _SELDOM:
            return f"{said} Chance alone would do this in {chance} % of cases."
        return f"{said} That may well be chance, which alone does this in {chance} % of cases: ask more prompts."


def count_votes(votes: Iterable[Vote]) -> Tally:
    """Counts all votes about one pair."""
    listed = list(votes)
    balance: Counter[int] = Counter()
    for vote in listed:
        balance[vote.number] += {"one": -1, "two": 1, "tie": 0}[vote.choice]
    said = Counter(vote.choice for vote in listed)
    prompts: Counter[Choice] = Counter()
    for sum_of_votes in balance.values():
        prompts["two" if sum_of_votes > 0 else "one" if sum_of_votes < 0 else "tie"] += 1
    choices: tuple[Choice, ...] = ("one", "two", "tie")
    return Tally({choice: said[choice] for choice in choices}, {choice: prompts[choice] for choice in choices})
