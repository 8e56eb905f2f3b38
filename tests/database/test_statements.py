"""The statements' files: found by name whichever room they are in."""

from __future__ import annotations

from collections import Counter

from daemon.database.statements import statement
from tests.paths import ROOT

FILES = sorted((ROOT / "sql" / "queries").glob("**/*.sql"))


def test_every_statement_has_a_room_and_a_name_of_its_own() -> None:
    assert FILES and {file.parent.parent.name for file in FILES} == {"queries"}
    assert [name for name, files in Counter(file.name for file in FILES).items() if files > 1] == []


def test_a_statement_is_read_without_its_comments() -> None:
    assert statement("next_due_job").startswith("SELECT extract(epoch FROM waiting.run_after")
    assert not any("-- " in statement(file.stem) for file in FILES)
