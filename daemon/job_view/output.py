"""Shows watched jobs again and again: a live view on a terminal, lines in a pipe, JSON for programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from uuid import UUID

from rich.console import Console
from rich.live import Live
from rich.text import Text

from daemon.job_view.event_lines import event_line
from daemon.job_view.picture import load, pace, picture
from daemon.job_view.reads import Event
from daemon.job_view.watched_jobs import WatchedJob
from daemon.terminal.console import print_json, say_aside
from daemon.terminal.format import loss, short_id
from daemon.terminal.sanitize import plain

_LAST_EVENTS = 5


class JobsView(Protocol):
    """Shows the jobs as they are now. `news` are the events since the last call; `notice` says what is wrong."""

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None: ...


@contextmanager
def open_view(screen: Console, *, several: bool) -> Iterator[JobsView]:
    """A live view if `screen` is a terminal, else lines; these begin with the job's id if there are several."""
    if not screen.is_terminal:
        yield PlainLines(screen, several)
        return
    with Live(console=screen, auto_refresh=False, vertical_overflow="crop") as live:
        yield _LiveView(live)


class _LiveView:
    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None:
        del news
        size = self._live.console.size
        self._live.update(picture(jobs, width=size.width, height=size.height, notice=notice), refresh=True)


class PlainLines:
    """Prints a line for each new event, each tenth of the progress, and each new reason for waiting."""

    def __init__(self, screen: Console, several: bool) -> None:
        self._screen = screen
        self._several = several
        self._tenths: dict[UUID, int] = {}
        self._waits: dict[UUID, str] = {}
        self._away = False
        self._begun = False

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None:
        if notice is not None and not self._away:
            self._print(Text(notice))
        self._away = notice is not None
        # Starting late, show only the last events; `events` shows all of them.
        for event in news if self._begun else news[-_LAST_EVENTS:]:
            self._print(event_line(event, with_job=self._several))
        self._begun = True
        for watched in jobs:
            self._show_progress(watched)

    def _show_progress(self, watched: WatchedJob) -> None:
        row = watched.row
        who = f"{short_id(row.job_id)}  " if self._several else ""
        now = time.strftime("%H:%M:%S")
        reason = row.waiting_reason or ""
        if reason and reason != self._waits.get(row.job_id):
            self._print(Text(f"{now}  {who}waits: {plain(reason)}"))
        self._waits[row.job_id] = reason
        tenth = int(row.progress // 10)
        if row.state == "running" and tenth != self._tenths.get(row.job_id):
            self._tenths[row.job_id] = tenth
            words = [f"{row.progress:.0f} %", pace(row), load(row)]
            if losses := watched.losses:
                words.append(f"loss {loss(losses[-1])}")
            self._print(Text(f"{now}  {who}" + " · ".join(word for word in words if word)))

    def _print(self, line: Text) -> None:
        # Wrapped by the terminal and not by us, so that it can be copied whole.
        self._screen.print(line, soft_wrap=True)


def _print_json(name: str, value: object) -> None:
    print_json({name: value})


class JsonLines:
    """Prints each new event as `event`, and each job that has changed as `job`."""

    def __init__(self, print_line: Callable[[str, object], None] = _print_json) -> None:
        self._print_line = print_line
        self._shown: dict[UUID, tuple[object, ...]] = {}

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None:
        if notice is not None:
            say_aside(notice)
        for event in news:
            self._print_line("event", event)
        for watched in jobs:
            row = watched.row
            now = (row.state, row.stage, row.progress, row.step, row.attempt, row.waiting_reason, row.cost)
            if self._shown.get(row.job_id) != now:
                self._shown[row.job_id] = now
                self._print_line("job", row)
