"""Formats a job's events, one line each, including events written by the app or an operator."""

from __future__ import annotations

from rich.text import Text

from daemon.job_view.reads import Event
from daemon.terminal.console import STATE_STYLE
from daemon.terminal.format import clock, money, short_id
from daemon.terminal.sanitize import plain

_STYLE = STATE_STYLE | {
    "retrying": "yellow",
    "reaped": "yellow",
    "released": "yellow",
    "returned": "yellow",
    "claimed": "cyan",
    "started": "green",
}
# The message of these kinds says what went wrong; the message of any other kind is a whole sentence.
_FAULTS = {
    "failed": "failed",
    "reaped": "taken back from a host that fell silent",
    "retrying": "goes back to the queue for another attempt",
}


def event_words(event: Event) -> str:
    """Says what happened, in one line."""
    data = event.data
    if event.kind == "sample":
        return f"{plain(data.get('when'))} training it answers: {plain(data.get('answer', ''))}"
    words = plain(event.message) or plain(event.kind)
    if event.kind in _FAULTS:
        words = f"{_FAULTS[event.kind]}: {words}"
    if event.kind in ("completed", "failed", "cancelled") and isinstance(cost := data.get("cost"), int | float):
        words += f" ({money(float(cost))})"
    return words


def event_line(event: Event, *, with_job: bool = False, width: int | None = None) -> Text:
    """Formats time, job (if there are several) and text; cut at `width` if given."""
    line = Text.assemble((f"{clock(event.at)}  ", "dim"))
    if with_job:
        line.append(f"{short_id(event.job_id)}  ", "cyan")
    line.append(event_words(event), _STYLE.get(event.kind, ""))
    if width is not None:
        line.truncate(width, overflow="ellipsis")
    return line
