"""Prints what the demo says: with colours on a terminal, as plain lines everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from daemon.demo.errors import DemoFailed
from daemon.job_view.output import JobsView, open_view
from daemon.sentence import as_sentence


class Screen:
    """Prints the demo's output in order. Colours and movement only on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, words: str) -> None:
        """Prints text that may contain a command. The terminal wraps it, so that it can be copied as one line."""
        self._console.print(words, highlight=False, markup=False, soft_wrap=True)

    def step(self, words: str) -> None:
        self._line(Text.assemble(("• ", "cyan"), words))

    def sql(self, statement: str) -> None:
        self._console.print()
        if self._console.is_terminal:
            self._console.print(Syntax(statement, "postgresql", theme="ansi_dark", word_wrap=True, padding=(0, 2)))
        else:
            self.say(statement)
        self._console.print()

    def row(self, row: Mapping[str, Any]) -> None:
        """Prints one row with a column per line, like psql's expanded display; empty columns are left out."""
        width = max(len(name) for name in row)
        for name, value in row.items():
            if shown := _shown(value):
                label = Text(f"  {name:<{width}} ", style="dim")
                if not self._console.is_terminal:
                    self._line(Text.assemble(label, "| ", shown))
                    continue
                # A grid, so that a long value wraps in its own column.
                line = Table.grid()
                line.add_row(label, "| ", Text(shown, overflow="fold"))
                self._console.print(line)

    def answers(self, question: str, before: str, after: str) -> None:
        table = Table.grid(padding=(0, 1))
        table.add_row(Text("unseen question", style="dim"), Text(question, style="bold"))
        table.add_row(Text("before training", style="dim"), Text(before.strip()))
        table.add_row(Text("after training", style="dim"), Text(after.strip(), style="green"))
        self._console.print(table)

    def result(self, words: str) -> None:
        self._line(Text.assemble(("✓ ", "bold green"), words))

    def failure(self, failed: DemoFailed) -> None:
        self._line(Text.assemble(("✗ ", "bold red"), as_sentence(failed.message)))
        if failed.detail and not self._console.is_terminal:
            self._line(failed.detail)
        elif failed.detail:
            self._console.print(Panel(Text(failed.detail), title="the end of the log", border_style="red"))

    def blank(self) -> None:
        self._console.print()

    @contextmanager
    def view(self) -> Iterator[JobsView]:
        """Shows the job, for as long as it runs."""
        with open_view(self._console, several=False) as view:
            yield view

    def _line(self, words: str | Text) -> None:
        # Soft wrap: outside a terminal, lines stay whole however long they are.
        self._console.print(words, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)


def _shown(value: object) -> str:
    """Formats a column's value; empty for NULL and for an object without numbers."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value.astimezone():%Y-%m-%d %H:%M:%S%z}"
    if isinstance(value, dict):
        rounded = {key: float(f"{item:.4g}") if isinstance(item, float) else item for key, item in value.items()}
        return ", ".join(f"{key} {item}" for key, item in rounded.items() if item is not None)
    return str(value)
