"""The texts of sql/queries and sql/reads, by name.

What two statements share is a file of its own, whose name begins with an underscore. The line `-- include: candidates`
stands for the text of _candidates.sql. The database sees one whole statement, and plans it as such.
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

    psycopg remembers how it translated a statement of at most 4,096 characters; a longer one is cut apart at each call.
    """
    text = _files(folder)[name].read_text(encoding="utf-8")
    text = _INCLUDE.sub(lambda found: statement(f"_{found[1]}", folder), text)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("--"))


@cache
def _files(folder: str) -> dict[str, Traversable]:
    """Every file of SQL by its name, whichever room it is in."""
    here = resources.files(f"sql.{folder}")
    rooms = (entry for entry in here.iterdir() if entry.is_dir())
    files = (file for room in (here, *rooms) for file in room.iterdir())
    return {file.name.removesuffix(".sql"): file for file in files if file.name.endswith(".sql")}
