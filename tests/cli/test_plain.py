"""Nothing that a stranger wrote reaches the terminal as more than its letters."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.terminal.format import age, count, money, size, span
from daemon.terminal.sanitize import plain, plain_lines
from daemon.terminal.sparkline import sparkline, squeeze

_FORBIDDEN = {"Cc", "Cs", "Zl", "Zp"}


@given(st.text())
def test_one_line_has_no_control_character(text: str) -> None:
    assert not [letter for letter in plain(text) if unicodedata.category(letter) in _FORBIDDEN]


@given(st.text())
def test_several_lines_have_none_but_their_ends(text: str) -> None:
    shown = plain_lines(text)
    assert not [letter for letter in shown if letter != "\n" and unicodedata.category(letter) in _FORBIDDEN]


@given(st.text(st.characters(categories=["L", "N", "P", "S", "M", "Zs"]), min_size=1))
def test_ordinary_words_stay_as_they_are(text: str) -> None:
    assert plain_lines(text) == text.rstrip("\r").expandtabs(4)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("a\r\nb\tc", "a b c"),
        ("user\u202egnp.exe", "usergnp.exe"),
        ("\x9b2J", "�2J"),
        ("[bold red]x[/]", "[bold red]x[/]"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_escape_codes_become_visible_and_harmless(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_progress_bar_keeps_its_last_state() -> None:
    assert plain_lines("10 %\r50 %\r100 %\r\ndone") == "100 %\ndone"


def test_numbers_are_short_and_carry_their_unit() -> None:
    assert [span(seconds) for seconds in (0.4, 65, 3 * 3600 + 720, 200_000, None)] == [
        "0s", "1m 05s", "3h 12m", "2d 7h", "–",
    ]  # fmt: skip
    assert [age(seconds) for seconds in (59, 125, 7_200)] == ["59s", "2m", "2h"]
    assert [size(num_bytes) for num_bytes in (78, 1_040, 160e9, 42e12)] == ["78 B", "1.0 kB", "160 GB", "42.0 TB"]
    assert (money(0.5), money(None)) == ("$0.50", "–")
    assert (count(1, "job"), count(1200, "job")) == ("1 job", "1,200 jobs")


def test_a_curve_falls_from_left_to_right_within_its_width() -> None:
    line = sparkline([3 / (1 + step) for step in range(500)], 20)
    assert len(line) == 20
    assert line[0] == "█"
    assert line[-1] == "▁"


def test_a_flat_curve_and_numbers_that_are_none_are_drawn_quietly() -> None:
    assert sparkline([2.0, 2.0, float("nan"), 2.0], 10) == "▁▁▁"
    assert sparkline([float("inf")], 10) == ""
    assert squeeze([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
