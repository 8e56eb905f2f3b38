"""The map of the repository names each room that there is, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.paths import ROOT

PAGE = ROOT / "docs" / "reference" / "map.md"
MAP = PAGE.read_text(encoding="utf-8")
# Every package in them is a room; of `tests` and `docs` the first level is.
PACKAGES, FOLDERS = ("daemon", "training", "sql"), ("tests", "docs")


def rooms() -> Iterator[str]:
    for package in PACKAGES:
        yield from (str(file.parent.relative_to(ROOT)) for file in (ROOT / package).glob("*/**/__init__.py"))
    of_the_daemon = {file.parent.name for file in (ROOT / "daemon").glob("*/__init__.py")}
    for folder in FOLDERS:
        for room in (ROOT / folder).iterdir():
            has_files = any(file.is_file() and "__pycache__" not in file.parts for file in room.rglob("*"))
            # A folder of tests that is called as a room of the daemon explains itself.
            if room.is_dir() and has_files and not (folder == "tests" and room.name in of_the_daemon):
                yield str(room.relative_to(ROOT))
    yield from ("benchmarks", "benchmarks/gpu")


def test_the_map_names_every_room_and_no_other() -> None:
    named = re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \|", MAP, re.MULTILINE)
    assert [room for room, link in named if (PAGE.parent / link).resolve() != ROOT / room] == []
    names = [room for room, _ in named]
    assert len(names) == len(set(names))
    assert set(names) ^ set(rooms()) == set()


def test_the_map_names_the_files_outside_of_rooms() -> None:
    for package in ("daemon", "training"):
        part = MAP[MAP.index(f"## {package}/") :]
        named = set(re.findall(r"`(\w+\.py)`", part[: part.index("\n## ", 1)]))
        assert named == {file.name for file in (ROOT / package).glob("*.py")} - {"__init__.py"}
