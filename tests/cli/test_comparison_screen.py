"""A comparison on a terminal of 80 columns, and as a program reads it."""

from __future__ import annotations

import json

import pytest

from daemon.cli.comparison_screen import show_comparison
from daemon.comparison.results import Answer, Comparison, Contestant, HeldOut, Prompt

LONG = "A long answer of many words that has to be wrapped within its own column to be readable at all. " * 3


def comparison(adapters: int, *, same_set: bool = True) -> Comparison:
    names = ["base", *(f"adapter{number}" for number in range(1, adapters + 1))]
    answers: list[Answer | None] = [Answer(f"{name} says: {LONG}", 60, cut=name == "base") for name in names]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why\x1b[2J is it so?"}]
    losses = {who: 2.0 - who / 10 for who in range(len(names))}
    sets = [HeldOut("common", 3, 4, 500, "a" * 12, [], losses)]
    sets += [
        HeldOut(str(who), 2, 2, 90, ("a" if same_set else str(who)) * 12, [], {0: 3.0, who: 2.5})
        for who in range(1, len(names))
    ]
    options = {"max_tokens": 60, "temperature": 0.0, "seed": 0, "device": "cpu", "quantize": False}
    return Comparison(
        "acme/tiny", [Contestant(name) for name in names], options, True, [Prompt(turns, "Because.", answers)], sets
    )


def screen(shown: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    show_comparison(shown)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("adapters", [1, 2, 5])
def test_answers_fit_in_80_columns_and_no_control_code_gets_through(
    adapters: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = screen(comparison(adapters), capsys, monkeypatch)
    assert max(map(len, lines)) <= 80
    assert "you › Why␛[2J is it so?" in lines and "in the data: Because." in lines
    assert "\x1b" not in "".join(lines)
    # Side by side while a column holds a sentence, else one below the other.
    beside = ["base", *(f"adapter{number}" for number in range(1, adapters + 1))]
    assert (beside in [line.split() for line in lines]) == (adapters < 3)
    assert "".join(lines).count("(cut)") == 1


def test_losses_of_different_sets_are_never_in_one_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = screen(comparison(2), capsys, monkeypatch)
    assert "HELD-OUT LOSS  SAME FOR ALL" in same and "held out: 4 answers of 3 conversations, 500 tokens" in same
    different = screen(comparison(2, same_set=False), capsys, monkeypatch)
    assert "HELD-OUT LOSS  SAME FOR ALL  ITS OWN SET  BASE THERE" in [line.rstrip() for line in different]
    assert ["adapter1", "1.9000", "2.5000", "3.0000"] in [line.split() for line in different]
    nothing = comparison(2, same_set=False)
    nothing.sets = nothing.sets[1:]
    apart = screen(nothing, capsys, monkeypatch)
    assert "no conversation is held out by all: these losses do not compare" in apart
    nothing.sets = []
    assert "no held-out loss: no held-out conversations are known" in screen(nothing, capsys, monkeypatch)


def test_an_adapter_whose_data_nobody_knows_is_named_beside_the_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = comparison(2)
    shown.sets[0].unknown = [2]
    assert "not known whether these were trained on it: adapter2" in screen(shown, capsys, monkeypatch)
    head, prompt = shown.as_lines()
    assert head["held_out"][0]["may_have_been_trained_on_by"] == ["adapter2"]
    assert head["held_out"][1]["set"] == "own of adapter1"
    assert json.loads(json.dumps(prompt))["answers"][0]["cut"] is True
