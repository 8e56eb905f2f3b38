"""Loads the statements of sql/queries and sql/reads by name.

Text that two statements share is in its own file, whose name begins with an underscore. The line
`-- include: candidates` is replaced by the text of _candidates.sql. The database receives one whole statement.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

_INCLUDE = re.compile(r"^ *-- include: (\w+)$", re.MULTILINE)


@cache
def statement(name: str, folder: str = "queries") -> str:
    """The text of <name>.sql in sql/<folder> or in one of its rooms, without its comments and indentation.

    psycopg caches the translation of statements up to 4,096 characters; it parses a longer one at each call.
    """
    text = _files(folder)[name].read_text(encoding="utf-8")
    text = _INCLUDE.sub(lambda found: statement(f"_{found[1]}", folder), text)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("--"))


def read_statement(name: str) -> bytes:
    """The text of a file of sql/reads, as a plain psycopg connection takes it."""
    return statement(name, "reads").encode()


@cache
def _files(folder: str) -> dict[str, Traversable]:
    """Every SQL file by its name, whichever room it is in."""
    here = resources.files(f"sql.{folder}")
    rooms = (entry for entry in here.iterdir() if entry.is_dir())
    files = (file for room in (here, *rooms) for file in room.iterdir())
    return {file.name.removesuffix(".sql"): file for file in files if file.name.endswith(".sql")}
