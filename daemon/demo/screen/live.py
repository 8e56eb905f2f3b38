"""Shows the demo: a live view on a terminal, plain lines everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from daemon.demo.errors import DemoFailed
from daemon.demo.job import JobView, StoryLine
from daemon.sentence import as_sentence
from daemon.terminal.braille_plot import draw_curve
from daemon.terminal.console import STATE_STYLE

_STORY_LINES = 6
_CURVE_HEIGHT = 6


class Picture(Protocol):
    """Shows a job's state again and again."""

    def show(self, view: JobView) -> None: ...


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
    def picture(self) -> Iterator[Picture]:
        """The live view, for as long as the job runs."""
        if not self._console.is_terminal:
            yield _PlainPicture(self._console)
            return
        with Live(console=self._console, refresh_per_second=4, transient=False) as live:
            yield _LivePicture(live)

    def _line(self, words: str | Text) -> None:
        # Soft wrap: outside a terminal, lines stay whole however long they are.
        self._console.print(words, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)


class _LivePicture:
    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, view: JobView) -> None:
        self._live.update(draw_picture(view, self._live.console.width))


class _PlainPicture:
    """Prints a line for each new event, and one for each tenth of the progress."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = 0
        self._tenth = -1

    def show(self, view: JobView) -> None:
        for line in view.story:
            if line.id > self._told:
                self._told = line.id
                self._print(line.at, _in_words(line))
        standing = view.standing
        tenth = int(standing.progress // 10)
        if tenth > self._tenth and standing.status == "running":
            self._tenth = tenth
            loss = f", loss {view.losses[-1].loss:.3f}" if view.losses else ""
            self._print(datetime.now(UTC), f"{standing.progress:.0f} %, {_pace(view)}{loss}")

    def _print(self, at: datetime, words: str) -> None:
        self._console.print(f"{at.astimezone():%H:%M:%S}  {words}", highlight=False, markup=False, soft_wrap=True)


def draw_picture(view: JobView, width: int) -> RenderableType:
    """Draws one job: state, pace, bar, curve, its last events."""
    standing = view.standing
    style = STATE_STYLE.get(standing.status, "white")
    head = Table.grid(expand=True)
    state = Text.assemble(("● ", style), (standing.status, style))
    if standing.current_stage != standing.status:
        state.append(f"  {standing.current_stage}", "bold")
    head.add_row(state, Text(_pace(view), justify="right"))
    inside = max(min(width, 100) - 6, 30)
    parts: list[RenderableType] = [head, ProgressBar(total=100.0, completed=standing.progress, width=inside)]
    parts += _curves(view, inside)
    parts.append(Text())
    for line in view.story[-_STORY_LINES:]:
        parts.append(
            Text.assemble(
                (f"{line.at.astimezone():%H:%M:%S}  ", "dim"), _in_words(line), overflow="ellipsis", no_wrap=True
            )
        )
    return Panel(Group(*parts), title="training_jobs", border_style=style, width=inside + 6, padding=(1, 2))


def _curves(view: JobView, width: int) -> list[RenderableType]:
    losses = [point.loss for point in view.losses]
    held_out = [point.loss for point in view.held_out_losses]
    if not losses:
        return []
    high, low = max(losses + held_out), min(0.0, *losses)
    total = max(view.standing.total_steps or 0, view.losses[-1].step)
    curve = draw_curve(losses, width=width - 6, height=_CURVE_HEIGHT, low=low, high=high, of=total)
    parts: list[RenderableType] = [Text()]
    for index, line in enumerate(curve):
        label = f"{high:5.2f} " if index == 0 else f"{low:5.2f} " if index == len(curve) - 1 else " " * 6
        parts.append(Text.assemble((label, "dim"), (line, "green")))
    words = Text.assemble(("loss ", "dim"), (f"{losses[-1]:.3f}", "green"))
    if held_out:
        first, last = held_out[0], held_out[-1]
        words.append("   held-out conversations ", "dim")
        words.append(f"{first:.3f}" if len(held_out) == 1 else f"{first:.3f} → {last:.3f}", "bold")
    parts.append(words)
    return parts


def _pace(view: JobView) -> str:
    standing = view.standing
    words = [f"step {standing.current_step} of {standing.total_steps}" if standing.total_steps else ""]
    if standing.tokens_per_second and not standing.is_final:
        words.append(f"{standing.tokens_per_second:,.0f} tokens/s")
    if standing.estimated_completion_at is not None and not standing.is_final:
        left = max((standing.estimated_completion_at - datetime.now(UTC)).total_seconds(), 0.0)
        words.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return " · ".join(word for word in words if word)


def _in_words(line: StoryLine) -> str:
    if line.kind == "sample":
        return f"{line.data.get('when')} training it answers: {line.data.get('answer', '')}".replace("\n", " ")
    if line.kind == "stage" and not line.message.startswith("Stage "):
        return f"Stage {line.data.get('stage')}: {line.message}"
    return line.message.splitlines()[0] if line.message else line.kind


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
