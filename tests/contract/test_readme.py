"""The README and the pages that it leads to name what is there: moves, settings, error codes."""

from __future__ import annotations

import re

from daemon.queue.states import MOVES
from daemon.settings import Settings
from tests.docs.render import variable_of
from tests.paths import ROOT
from training.events import ErrorCode
from training.spec import Hyperparameters

README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "docs" / "reference"


def first_cells(page: str) -> list[str]:
    """What each table of a page says in its first column, without the marks of code."""
    return [cell.strip().strip("`") for cell in re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)]


def test_the_readme_is_read_in_two_minutes() -> None:
    """Its rest has pages of its own: a new line here pushes an old one there."""
    assert len(README.splitlines()) <= 130


def test_every_move_of_a_job_stands_in_the_readme() -> None:
    # Two moves of the state machine are one for a reader: the host is lost.
    moves = {move.name for move in MOVES if move.name != "reap_for_good"}
    table = README[README.index("## States") :]
    assert moves <= set(first_cells(table[: table.index("\n## ", 1)]))


def test_every_setting_has_one_line_in_the_configuration() -> None:
    page = (REFERENCE / "configuration.md").read_text(encoding="utf-8")
    named = first_cells(page)
    assert [variable for variable in map(variable_of, Settings.model_fields) if named.count(variable) != 1] == []


def test_every_error_code_has_its_line() -> None:
    named = first_cells((REFERENCE / "errors.md").read_text(encoding="utf-8"))
    assert [code for code in ErrorCode if code not in named] == []


def test_every_field_has_a_description() -> None:
    for model in (Settings, Hyperparameters):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_the_rooms_that_the_readme_names_are_there() -> None:
    part = README[README.index("## Map") :]
    top, named = ROOT, []
    for line in re.findall(r"^ {4}(?!row ->).*", part[: part.index("\n## ", 1)], re.MULTILINE):
        words = re.findall(r"([a-z_]+)/", line)
        if not line.startswith(" " * 5):
            top = ROOT / words.pop(0)
        named += [top, *(top / word for word in words)]
    assert len(named) > 20 and [room for room in named if not room.is_dir()] == []
