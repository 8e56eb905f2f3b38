"""Watches jobs live until they end: a live view on a terminal, lines in a pipe, JSON for programs.

LISTEN reports inserts, requeues and cancels. Progress sends no NOTIFY, so it is read once a second.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

if TYPE_CHECKING:
    from uuid import UUID

    from rich.console import Console
    from rich.live import Live

    from daemon.cli.data.connection import Connection
    from daemon.cli.data.queries import Event
    from daemon.cli.watching.watched_jobs import Feed, WatchedJob

# A daemon writes a job's progress about once a second.
READ_SECONDS = 1.0
AWAY_SECONDS = 2.0
# More than fit on a screen, few enough for one read a second.
MAX_WATCHED = 100
LAST_WORDS = 5


class _Picture(Protocol):
    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None: ...


def watch(
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Job ids, or their first characters; default: all unfinished jobs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Watch jobs live until they end. Exit status 1 if any of them did not complete.

    Ctrl-C stops only the watching, not the jobs.
    """
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import find_job, list_jobs
    from daemon.terminal.console import say

    with open_database() as connection:
        if wanted:
            ids = list(dict.fromkeys(find_job(connection, one) for one in wanted))
        else:
            unfinished = ["queued", "initializing", "running", "lost"]
            ids = [row.job_id for row in list_jobs(connection, states=unfinished, limit=MAX_WATCHED)]
    if not ids:
        if not as_json:
            say("no job is unfinished; `jobs` lists the others")
        return
    raise typer.Exit(watch_jobs(ids, as_json=as_json))


def watch_jobs(ids: Sequence[UUID], *, as_json: bool = False) -> int:
    """Shows the jobs until all have ended. Returns the exit status: 0 if all completed, 130 if interrupted."""
    from daemon.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED
    from daemon.cli.watching.watched_jobs import Feed
    from daemon.terminal.console import console, say_aside

    feed = Feed(ids)
    screen = console()
    try:
        with _picture(screen, as_json, several=len(ids) > 1) as picture:
            _follow(feed, picture)
    except KeyboardInterrupt:
        say_aside("no longer watching; the jobs go on")
        return EXIT_INTERRUPTED
    if not as_json:
        _say_endings(feed)
    return 0 if feed.succeeded else EXIT_FAILED


def _follow(feed: Feed, picture: _Picture) -> None:
    """Reads and shows until all jobs have ended. Waits if the database goes away, but the first read must succeed."""
    from daemon.cli.data.connection import connect
    from daemon.cli.watching.notifications import listen, wait_for_change
    from daemon.errors import DatabaseAway

    connection: Connection | None = None
    seen = False
    try:
        while True:
            try:
                if connection is None:
                    connection = connect()
                    listen(connection)
                with _said_plainly():
                    news = feed.read(connection)
                    seen = True
                    picture.show(list(feed.jobs.values()), news, None)
                    if feed.over:
                        return
                    wait_for_change(connection, READ_SECONDS)
            except DatabaseAway as error:
                if connection is not None:
                    connection.close()
                    connection = None
                if not seen:
                    raise
                picture.show(list(feed.jobs.values()), (), f"the database does not answer, trying again: {error}")
                time.sleep(AWAY_SECONDS)
    finally:
        if connection is not None:
            connection.close()


def _said_plainly() -> contextlib.AbstractContextManager[None]:
    from daemon.cli.data.connection import said_plainly

    return said_plainly()


@contextlib.contextmanager
def _picture(screen: Console, as_json: bool, *, several: bool) -> Iterator[_Picture]:
    if as_json:
        yield _JsonLines()
        return
    if not screen.is_terminal:
        yield _PlainLines(several)
        return
    from rich.live import Live

    with Live(console=screen, auto_refresh=False, vertical_overflow="crop") as live:
        yield _LivePicture(live)


class _LivePicture:
    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None:
        from daemon.cli.watching.watch_view import picture

        del news
        size = self._live.console.size
        self._live.update(picture(jobs, width=size.width, height=size.height, notice=notice), refresh=True)


class _PlainLines:
    """Prints a line for each new event, each tenth of the progress, and each new reason for waiting."""

    def __init__(self, several: bool) -> None:
        self._several = several
        self._tenths: dict[UUID, int] = {}
        self._waits: dict[UUID, str] = {}
        self._away = False
        self._begun = False

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None:
        from daemon.cli.watching.event_lines import event_line
        from daemon.terminal.console import say

        if notice is not None and not self._away:
            say(notice)
        self._away = notice is not None
        # Starting late, show only the last events; `events` shows all of them.
        for event in news if self._begun else news[-LAST_WORDS:]:
            say(event_line(event, with_job=self._several))
        self._begun = True
        for watched in jobs:
            self._show_way(watched)

    def _show_way(self, watched: WatchedJob) -> None:
        from daemon.cli.watching.watch_view import load, pace
        from daemon.terminal.console import say
        from daemon.terminal.format import loss, short_id
        from daemon.terminal.sanitize import plain

        row = watched.row
        who = f"{short_id(row.job_id)}  " if self._several else ""
        now = time.strftime("%H:%M:%S")
        reason = row.waiting_reason or ""
        if reason and reason != self._waits.get(row.job_id):
            say(f"{now}  {who}waits: {plain(reason)}")
        self._waits[row.job_id] = reason
        tenth = int(row.progress // 10)
        if row.state == "running" and tenth != self._tenths.get(row.job_id):
            self._tenths[row.job_id] = tenth
            words = [f"{row.progress:.0f} %", pace(row), load(row)]
            if losses := watched.losses:
                words.append(f"loss {loss(losses[-1])}")
            say(f"{now}  {who}" + " · ".join(word for word in words if word))


class _JsonLines:
    """Prints `{"event": …}` for each new event, and `{"job": …}` whenever a job has changed."""

    def __init__(self) -> None:
        self._shown: dict[UUID, tuple[object, ...]] = {}

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None:
        import dataclasses

        from daemon.terminal.console import print_json, say_aside

        if notice is not None:
            say_aside(notice)
        for event in news:
            print_json({"event": dataclasses.asdict(event)})
        for watched in jobs:
            row = watched.row
            now = (row.state, row.stage, row.progress, row.step, row.attempt, row.waiting_reason, row.cost)
            if self._shown.get(row.job_id) != now:
                self._shown[row.job_id] = now
                print_json({"job": dataclasses.asdict(row)})


def _say_endings(feed: Feed) -> None:
    """Prints one line per job after the live view is gone: how it ended, and what to do next."""
    from rich.text import Text

    from daemon.sentence import without_advice
    from daemon.terminal.console import say
    from daemon.terminal.format import money, short_id, span
    from daemon.terminal.sanitize import plain

    for watched in feed.jobs.values():
        row = watched.row
        name = short_id(row.job_id)
        if row.state == "completed":
            words = f"{name} completed in {span(row.run_seconds)}, {money(row.cost)}: "
            say(Text.assemble(("✓ ", "bold green"), words, (f"brightrun-trainer download {name}", "bold")))
            continue
        reason = ""
        if row.state == "failed" and row.error_message:
            reason = f": {plain(without_advice(row.error_message, row.error_hint))}"
        say(Text.assemble(("✗ ", "bold red"), f"{name} {row.state}{reason}"))
        if row.state == "failed" and row.error_hint:
            say(Text(f"  → {plain(row.error_hint)}", style="bold"))
