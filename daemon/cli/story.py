"""A job's events in words: one line each, whoever wrote what stands in them."""

from __future__ import annotations

from rich.text import Text

from daemon.cli.plain import plain
from daemon.cli.rows import Event
from daemon.cli.wording import clock, money, short_id

_STYLE = {
    "completed": "bold green",
    "failed": "bold red",
    "cancelled": "magenta",
    "retrying": "yellow",
    "reaped": "yellow",
    "released": "yellow",
    "claimed": "cyan",
    "started": "green",
}
_MOVES = {
    "queued": "queued",
    "claimed": "claimed by a daemon",
    "started": "training has begun: the first step is done",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "released": "given back to the queue unharmed",
    "reaped": "taken back from a host that fell silent",
    "retrying": "goes back to the queue for another attempt",
    "resubmitted": "submitted again, from zero",
}


def event_words(event: Event) -> str:
    """What happened, in one line."""
    data = event.data
    if event.kind == "sample":
        return f"{plain(data.get('when'))} training it answers: {plain(data.get('answer', ''))}"
    words = plain(event.message)
    if event.kind in _MOVES:
        words = _MOVES[event.kind] + (f": {words}" if words else "")
        if event.kind == "claimed":
            words += f" (attempt {plain(data.get('attempt'))})"
        if event.kind in ("completed", "failed", "cancelled") and isinstance(cost := data.get("cost"), int | float):
            words += f" ({money(float(cost))})"
        return words
    return words or plain(event.kind)


def event_line(event: Event, *, with_job: bool = False, width: int | None = None) -> Text:
    """Time, job (among several), words; cut at `width` when one is given."""
    line = Text.assemble((f"{clock(event.at)}  ", "dim"))
    if with_job:
        line.append(f"{short_id(event.job_id)}  ", "cyan")
    line.append(event_words(event), _STYLE.get(event.kind, ""))
    if width is not None:
        line.truncate(width, overflow="ellipsis")
    return line
