"""Counts that do not say more than they show, against the numbers of statisticians' tables."""

from __future__ import annotations

import math

import pytest

from daemon.comparison.tally import Choice, Tally, Vote, count_votes


def tally(one: int, two: int, tie: int = 0) -> Tally:
    choices: list[Choice] = [*["one"] * one, *["two"] * two, *["tie"] * tie]  # type: ignore[list-item]
    return count_votes(Vote(number, choice) for number, choice in enumerate(choices, start=1))


@pytest.mark.parametrize(
    ("one", "two", "p_value"), [(0, 5, 0.0625), (0, 6, 0.03125), (3, 3, 1.0), (1, 9, 0.021484375), (5, 15, 0.04139)]
)
def test_the_sign_test_is_that_of_the_tables(one: int, two: int, p_value: float) -> None:
    found = tally(one, two).p_value
    assert found is not None and math.isclose(found, p_value, rel_tol=1e-3)
    assert tally(two, one).p_value == found


def test_wilsons_interval_is_that_of_the_tables() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29.
    for wins, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        found = tally(total - wins, wins).interval
        assert found == pytest.approx((low, high), abs=5e-5)
    assert tally(0, 0, 4).interval is None and tally(0, 0).p_value is None


def test_the_test_counts_prompts_and_not_votes() -> None:
    """Ten people who all prefer one answer have seen one prompt."""
    crowd = count_votes(Vote(1, "two") for _ in range(10))
    assert crowd.votes["two"] == 10 and crowd.prompts["two"] == 1 and crowd.p_value == 1.0
    split = count_votes([Vote(1, "two"), Vote(1, "one"), Vote(2, "tie"), Vote(2, "two")])
    assert split.prompts == {"one": 0, "two": 1, "tie": 1}


def test_words_say_who_is_ahead_and_whether_that_may_be_chance() -> None:
    assert tally(0, 0, 3).in_words("A", "B") == "No prompt is decided; 3 tied."
    assert tally(2, 2).in_words("A", "B").startswith("A and B are preferred on 2 prompts each. That may well be chance")
    few = tally(3, 1).in_words("A", "B")
    assert few.startswith("A is preferred on 3 of 4 decided prompts, 75 % (95 % interval 30 to 95 %).")
    assert "may well be chance" in few
    assert "which alone does this in 100 % of cases" in tally(1, 2).in_words("A", "B")
    assert "Chance alone would do this in 0.8 % of cases." in tally(0, 8).in_words("A", "B")
    many = tally(2, 18, 5).in_words("A", "B")
    assert many == (
        "B is preferred on 18 of 20 decided prompts, 90 % (95 % interval 70 to 97 %); 5 tied. "
        "Chance alone would do this in less than 0.1 % of cases."
    )
    assert tally(2_000, 3_000).p_value is not None
