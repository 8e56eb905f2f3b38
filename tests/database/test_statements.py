"""The statements' files: found by name whichever room they are in, put together where they share a text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from daemon.database.statements import statement
from tests.paths import ROOT

FILES = sorted((ROOT / "sql" / "queries").glob("**/*.sql"))


def test_every_statement_has_a_room_and_a_name_of_its_own() -> None:
    assert FILES and {file.parent.parent.name for file in FILES} == {"queries"}
    assert [name for name, files in Counter(file.name for file in FILES).items() if files > 1] == []


def test_a_statement_is_read_without_its_comments() -> None:
    assert statement("next_due_job").startswith("SELECT extract(epoch FROM waiting.run_after")
    assert not any("--" in statement(file.stem) for file in FILES)


def test_what_is_included_stands_whole_in_every_statement_that_names_it() -> None:
    users = defaultdict(set)
    for file in FILES:
        for name in re.findall(r"-- *include\b:? *(\w+)", file.read_text()):
            assert statement(f"_{name}") in statement(file.stem), f"{file.name}: {name}"
            users[f"_{name}"].add(file.stem)
    shared = {file.stem for file in FILES if file.stem.startswith("_")}
    assert {name for name, statements in users.items() if len(statements) > 1} == shared
    assert {"claim_job", "peek_next_job"} == users["_candidates"] == users["_candidates_in_order"]
