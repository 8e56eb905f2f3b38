"""Draws watched jobs on a terminal: a single job large with its curve, several with a few lines each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from daemon.job_view.event_lines import event_line
from daemon.job_view.reads import JobRow
from daemon.job_view.watched_jobs import WatchedJob
from daemon.terminal.braille_plot import draw_curve
from daemon.terminal.console import STATE_STYLE
from daemon.terminal.format import count, loss, money, short_id, span
from daemon.terminal.sanitize import plain
from daemon.terminal.sparkline import sparkline, squeeze

_CURVE_HEIGHT = 6
_STORY_LINES = 6
# Lines per job among several, including the blank line below it.
_BLOCK_LINES = 5
_MAX_WIDTH = 120
_LABEL = 7


def picture(jobs: Sequence[WatchedJob], *, width: int, height: int, notice: str | None) -> RenderableType:
    """Draws as many jobs as fit on the screen, unfinished ones first. `notice` is below, in red."""
    width = min(width, _MAX_WIDTH)
    parts: list[RenderableType] = []
    if len(jobs) == 1:
        parts.append(_large(jobs[0], width))
    else:
        ordered = sorted(jobs, key=lambda watched: (watched.row.is_final, watched.row.state == "queued"))
        room = max((height - 2) // _BLOCK_LINES, 1)
        parts += [_block(watched, width) for watched in ordered[:room]]
        if len(ordered) > room:
            parts.append(Text(f"… and {_tally(ordered[room:])}", style="dim"))
    if notice is not None:
        parts.append(Text(plain(notice), style="red"))
    return Group(*parts)


def pace(row: JobRow) -> str:
    """Step, time left and cost of a running job."""
    words = [f"step {row.step} of {row.total_steps}" if row.total_steps else f"step {row.step}" if row.step else ""]
    if not row.is_final and row.seconds_left is not None:
        words.append(f"{span(row.seconds_left)} left")
    if row.is_final and row.run_seconds is not None:
        words.append(f"ran {span(row.run_seconds)}")
    if row.cost is not None and (row.cost or row.is_final):
        words.append(money(row.cost))
    return " · ".join(word for word in words if word)


def load(row: JobRow) -> str:
    """Tokens per second and the GPU's load, as far as it is reported."""
    words = []
    if (tokens := row.metric("throughput")) is not None:
        words.append(f"{tokens:,.0f} tokens/s")
    card = []
    if (busy := row.metric("gpu_utilization")) is not None:
        card.append(f"{busy:.0f} %")
    used = row.metric("gpu_memory_used_gib")
    if (memory := used if used is not None else row.metric("gpu_memory_gib")) is not None:
        card.append(f"{memory:.1f} GiB")
    if (degrees := row.metric("gpu_temperature_celsius")) is not None:
        card.append(f"{degrees:.0f} °C")
    if card:
        words.append("GPU " + " ".join(card))
    return " · ".join(words)


def _head(row: JobRow) -> Text:
    style = STATE_STYLE.get(row.state, "white")
    text = Text.assemble(("● ", style), (short_id(row.job_id), "bold"), "  ", (plain(row.state), style))
    if row.state in ("initializing", "running", "lost"):
        text.append(f" · {plain(row.stage)}")
    if row.attempt > 1:
        text.append(f" · attempt {row.attempt} of {row.max_attempts}", "yellow")
    return text


def _two_ends(left: Text, right: Text, width: int) -> Table:
    table = Table.grid(padding=0)
    # The right part may be cut.
    right_width = max(min(right.cell_len, width - left.cell_len - 2), 0)
    right.truncate(right_width, overflow="ellipsis")
    table.add_column(width=width - right_width, no_wrap=True, overflow="ellipsis")
    table.add_column(width=right_width, no_wrap=True, justify="right")
    table.add_row(left, right)
    return table


def _model(row: JobRow, width: int) -> Text:
    name = plain(row.model or "(default model)")
    return Text(name if width >= 100 else name.rpartition("/")[2], style="dim")


def _block(watched: WatchedJob, width: int) -> RenderableType:
    """Draws four lines: job and host, progress, loss, the last event."""
    row = watched.row
    bar = Table.grid(padding=(0, 1))
    bar_width = 30 if width >= 100 else 18
    bar.add_row(
        Text(" "),
        ProgressBar(total=100.0, completed=row.progress, width=bar_width, complete_style=_bar_style(row)),
        Text(f"{row.progress:3.0f} %"),
        Text(pace(row), style="dim"),
    )
    how_well = Text(f"  for {span(row.age_seconds)}" if row.state == "queued" else "  ")
    if losses := watched.losses:
        how_well.append("loss ", "dim").append(loss(losses[-1]), "green")
        how_well.append(" " + sparkline(losses, bar_width - 8) + " ", "green")
    if held_out := watched.validation_losses:
        how_well.append("held out ", "dim").append(loss(held_out[-1]), "bold").append(" ")
    how_well.append(load(row), "dim")
    how_well.truncate(width, overflow="ellipsis")
    return Group(_two_ends(_head(row), _model(row, width), width), bar, how_well, _last_word(watched, width), Text())


def _last_word(watched: WatchedJob, width: int) -> Text:
    row = watched.row
    if row.waiting_reason:
        words = Text(f"  waits: {plain(row.waiting_reason)}", style="yellow")
    elif row.state == "failed":
        words = Text(f"  {plain(row.error_message or row.error_code or '')}", style="red")
    elif watched.story:
        words = Text("  ").append(event_line(watched.story[-1]))
    else:
        words = Text()
    words.truncate(width, overflow="ellipsis")
    return words


def _large(watched: WatchedJob, width: int) -> RenderableType:
    row = watched.row
    inside = max(width - 6, 30)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=100.0, completed=row.progress, width=inside - 6, complete_style=_bar_style(row)),
        Text(f"{row.progress:3.0f} %"),
    )
    parts: list[RenderableType] = [
        _two_ends(_head(row), _model(row, width), inside),
        bar,
        _two_ends(Text(pace(row)), Text(load(row), style="dim"), inside),
    ]
    if row.waiting_reason:
        parts.append(Text(f"waits: {plain(row.waiting_reason)}", style="yellow"))
    parts += _curve(watched, inside)
    parts.append(Text())
    parts += [event_line(event, width=inside) for event in watched.story[-_STORY_LINES:]]
    style = STATE_STYLE.get(row.state, "white").removeprefix("bold ")
    return Panel(Group(*parts), border_style=style, width=width, padding=(0, 2))


def _curve(watched: WatchedJob, width: int) -> list[RenderableType]:
    points = [(point.step, point.loss) for point in watched.curve if math.isfinite(point.loss)]
    if not points:
        return []
    columns = (width - _LABEL) * 2
    total = max(watched.row.total_steps or 0, points[-1][0], 1)
    # As wide as the progress: the empty part is what is left to do.
    wanted = max(round(columns * points[-1][0] / total), 1)
    values = squeeze([value for _step, value in points], wanted)
    high = max(values + watched.validation_losses)
    low = min(0.0, *values) if min(values) < high / 2 else min(values + watched.validation_losses)
    of = max(round(len(values) * total / points[-1][0]), len(values))
    lines = draw_curve(values, width=width - _LABEL, height=_CURVE_HEIGHT, low=low, high=high, of=of)
    labels = {0: f"{high:6.2f} ", len(lines) - 1: f"{low:6.2f} "}
    parts: list[RenderableType] = [Text()]
    parts += [
        Text.assemble((labels.get(index, " " * _LABEL), "dim"), (line, "green")) for index, line in enumerate(lines)
    ]
    words = Text.assemble((" " * _LABEL + "loss ", "dim"), (loss(points[-1][1]), "green"))
    if held_out := watched.validation_losses:
        words.append("   held out ", "dim").append(loss(held_out[0]), "bold")
        if len(held_out) > 1:
            words.append(f" → {loss(held_out[-1])}", "bold")
    return [*parts, words]


def _bar_style(row: JobRow) -> str:
    return {"failed": "red", "lost": "red", "cancelled": "magenta"}.get(row.state, "green")


def _tally(jobs: Sequence[WatchedJob]) -> str:
    states: dict[str, int] = {}
    for watched in jobs:
        states[watched.row.state] = states.get(watched.row.state, 0) + 1
    return f"{count(len(jobs), 'more job')}: " + ", ".join(f"{number} {state}" for state, number in states.items())
