"""Prints a command's output: to a console without markup, or as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon.terminal.sanitize import plain

# A pipe has no width: keep rows whole for grep.
_PIPE_WIDTH = 200

STATE_STYLE = {
    "queued": "yellow",
    "initializing": "cyan",
    "running": "green",
    "completed": "bold green",
    "failed": "bold red",
    "cancelled": "magenta",
    "lost": "red",
}


def console(*, stderr: bool = False) -> Console:
    """A console that prints every text literally."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def say(words: str | Text) -> None:
    """Prints one line, wrapped by the terminal and not by us, so that it can be copied whole."""
    console().print(words, soft_wrap=True)


def say_done(words: str) -> None:
    """Prints one line about something that was done."""
    say(Text.assemble(("✓ ", "bold green"), words))


def say_aside(words: str) -> None:
    """Prints one line beside the answer, on stderr, so that it never ends up in a pipe."""
    console(stderr=True).print(Text(words, style="dim"), soft_wrap=True)


def print_json(value: Any) -> None:
    """Prints one object on one line. Escapes every control character, so that it is safe on a terminal, too."""
    typer.echo(json.dumps(value, default=_as_json, allow_nan=False))


def columns_table() -> Table:
    """A table of aligned columns without borders, easy to read and to copy."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", collapse_padding=True)


def facts_table() -> Table:
    """A table of two columns, name and value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def state_text(state: str) -> Text:
    style = STATE_STYLE.get(state, "white")
    return Text.assemble(("● ", style), (plain(state), style))


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID | Path):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
