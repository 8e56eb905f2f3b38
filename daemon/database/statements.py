"""The texts of sql/queries and sql/reads, by name."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def statement(name: str, folder: str = "queries") -> str:
    """The text of sql/<folder>/<name>.sql, without its comments and indentation.

    psycopg remembers how it translated a statement of at most 4,096 characters; a longer one is cut apart at each call.
    """
    text = (resources.files(f"sql.{folder}") / f"{name}.sql").read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("--"))
