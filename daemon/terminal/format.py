"""Formats numbers and times for people: short, with their unit, and no more digits than useful."""

from __future__ import annotations

from datetime import datetime

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_UNKNOWN = "–"


def short_id(value: object) -> str:
    """The first eight characters, which every command accepts in place of the whole id."""
    return str(value)[:8]


def span(seconds: float | None) -> str:
    """A duration in at most two units: 8s, 4m 05s, 3h 12m, 5d 2h."""
    if seconds is None:
        return _UNKNOWN
    seconds = max(seconds, 0.0)
    if seconds < _MINUTE:
        return f"{seconds:.0f}s"
    if seconds < _HOUR:
        return f"{int(seconds // _MINUTE)}m {int(seconds % _MINUTE):02d}s"
    if seconds < _DAY:
        return f"{int(seconds // _HOUR)}h {int(seconds % _HOUR // _MINUTE):02d}m"
    return f"{int(seconds // _DAY)}d {int(seconds % _DAY // _HOUR)}h"


def age(seconds: float | None) -> str:
    """How long ago, in one unit, for a narrow column."""
    return _UNKNOWN if seconds is None else span(seconds).split(" ", 1)[0]


def money(dollars: float | None) -> str:
    """US dollars to the cent."""
    return _UNKNOWN if dollars is None else f"${dollars:,.2f}"


def size(num_bytes: float | None) -> str:
    """Bytes in decimal units, as disks and the hub count them."""
    if num_bytes is None:
        return _UNKNOWN
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def clock(instant: datetime | None) -> str:
    """The local time; with the date only if it is not today."""
    if instant is None:
        return _UNKNOWN
    here = instant.astimezone()
    today = datetime.now(here.tzinfo).date()
    return f"{here:%H:%M:%S}" if here.date() == today else f"{here:%Y-%m-%d %H:%M}"


def count(number: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def loss(value: float | None) -> str:
    """A loss with three digits after the point; – if unknown."""
    return _UNKNOWN if value is None else f"{value:.3f}"
