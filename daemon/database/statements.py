"""The texts of sql/queries and sql/reads, by name."""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable


@cache
def statement(name: str, folder: str = "queries") -> str:
    """The text of <name>.sql in sql/<folder> or in one of its rooms, without its comments and indentation.

    psycopg remembers how it translated a statement of at most 4,096 characters; a longer one is cut apart at each call.
    """
    lines = (line.strip() for line in _files(folder)[name].read_text(encoding="utf-8").splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("--"))


@cache
def _files(folder: str) -> dict[str, Traversable]:
    """Every statement's file by its name, whichever room it is in."""
    here = resources.files(f"sql.{folder}")
    rooms = (entry for entry in here.iterdir() if entry.is_dir())
    files = (file for room in (here, *rooms) for file in room.iterdir())
    return {file.name.removesuffix(".sql"): file for file in files if file.name.endswith(".sql")}
