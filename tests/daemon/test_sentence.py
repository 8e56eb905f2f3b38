"""Fragments become sentences; what is no plain word keeps its letters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.sentence import as_sentence, with_advice, without_advice


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("the dataset is empty", "The dataset is empty."),
        ("the dataset is empty.", "The dataset is empty."),
        ("submit again; if it fails, ask", "Submit again; if it fails, ask."),
        ("  is the disk full? ", "Is the disk full?"),
        ("out of memory: tried to allocate 2 GiB;", "Out of memory: tried to allocate 2 GiB."),
        ("run `brightrun-trainer migrate`", "Run `brightrun-trainer migrate`."),
        ("the model is damaged (shard 2 is cut.)", "The model is damaged (shard 2 is cut.)"),
        # A setting, a path, a file, a command and a library's word are no plain words.
        ("lora_rank is too high", "lora_rank is too high."),
        ("acme/tiny is gated", "acme/tiny is gated."),
        ("data.jsonl is a folder", "data.jsonl is a folder."),
        ("`jobs` lists them", "`jobs` lists them."),
        ("brightrun-trainer migrate brings it", "brightrun-trainer migrate brings it."),
        ("cudaErrorUnknown: unknown error", "cudaErrorUnknown: unknown error."),
        # A list keeps its lines.
        ("two faults:\n- seed: must be a number", "Two faults:\n- seed: must be a number"),
        ("two faults:\n  the table is missing", "Two faults:\n  the table is missing"),
        ("the library says\nno", "The library says\nno."),
        ("", ""),
    ],
)
def test_a_fragment_becomes_a_sentence(text: str, sentence: str) -> None:
    assert as_sentence(text) == sentence


@given(st.text())
def test_a_sentence_stays_as_it_is(text: str) -> None:
    once = as_sentence(text)
    assert as_sentence(once) == once


@given(st.text(min_size=1))
def test_nothing_is_lost_but_blanks_and_loose_ends(text: str) -> None:
    assert as_sentence(text).lower().rstrip(" .,;:") == text.strip().lower().rstrip(" .,;:")


@pytest.mark.parametrize(
    ("message", "hint", "both"),
    [
        ("it broke", "mend it", "It broke. Mend it."),
        ("It broke.", None, "It broke."),
        ("It broke. Mend it.", "mend it", "It broke. Mend it."),
        (
            "2 faults.\n- epochs: bad\n- rank: bad",
            "Correct them.",
            "2 faults.\n- epochs: bad\n- rank: bad\nCorrect them.",
        ),
        ("", "mend it", "Mend it."),
    ],
)
def test_a_message_says_what_to_do_once(message: str, hint: str | None, both: str) -> None:
    assert with_advice(message, hint) == both
    assert with_advice(both, hint) == both


@pytest.mark.parametrize(
    ("message", "hint", "happened"),
    [
        ("It broke. Mend it.", "Mend it.", "It broke."),
        ("2 faults.\n- epochs: bad\nCorrect them.", "Correct them.", "2 faults.\n- epochs: bad"),
        # Of a host of an older version.
        ("It broke.", "Mend it.", "It broke."),
        ("It broke.", None, "It broke."),
        ("Mend it.", "Mend it.", "Mend it."),
    ],
)
def test_what_happened_can_be_shown_alone(message: str, hint: str | None, happened: str) -> None:
    assert without_advice(message, hint) == happened
