"""Watches jobs live until they end: a live view on a terminal, lines in a pipe, JSON for programs.

LISTEN reports inserts, requeues and cancels. Progress sends no NOTIFY, so it is read once a second.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from uuid import UUID

    from daemon.cli.data.connection import Connection
    from daemon.job_view.output import JobsView
    from daemon.job_view.watched_jobs import WatchedJobs

# A daemon writes a job's progress about once a second.
READ_SECONDS = 1.0
# More than fit on a screen, few enough for one read a second.
MAX_WATCHED = 100


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
    from daemon.cli.data.queries import find_job
    from daemon.job_view.reads import list_jobs
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
    from daemon.job_view.watched_jobs import WatchedJobs
    from daemon.terminal.console import say_aside

    jobs = WatchedJobs(ids)
    try:
        with _open_view(as_json=as_json, several=len(ids) > 1) as view:
            _follow(jobs, view)
    except KeyboardInterrupt:
        say_aside("no longer watching; the jobs go on")
        return EXIT_INTERRUPTED
    if not as_json:
        _say_endings(jobs)
    return 0 if jobs.succeeded else EXIT_FAILED


def _follow(jobs: WatchedJobs, view: JobsView) -> None:
    """Reads and shows until all jobs have ended. Waits if the database goes away, but the first read must succeed."""
    from daemon.cli.data.connection import connect, said_plainly
    from daemon.cli.data.notifications import listen, wait_for_change
    from daemon.database.retry import AWAY_SECONDS
    from daemon.errors import DatabaseAway

    connection: Connection | None = None
    seen = False
    try:
        while True:
            try:
                if connection is None:
                    connection = connect()
                    listen(connection)
                with said_plainly():
                    news = jobs.read(connection)
                    seen = True
                    view.show(jobs.all, news, None)
                    if jobs.over:
                        return
                    wait_for_change(connection, READ_SECONDS)
            except DatabaseAway as error:
                if connection is not None:
                    connection.close()
                    connection = None
                if not seen:
                    raise
                view.show(jobs.all, (), f"the database does not answer, trying again: {error}")
                time.sleep(AWAY_SECONDS)
    finally:
        if connection is not None:
            connection.close()


@contextlib.contextmanager
def _open_view(*, as_json: bool, several: bool) -> Iterator[JobsView]:
    from daemon.job_view.output import JsonLines, open_view
    from daemon.terminal.console import console

    if as_json:
        yield JsonLines()
        return
    with open_view(console(), several=several) as view:
        yield view


def _say_endings(jobs: WatchedJobs) -> None:
    """Prints one line per job after the live view is gone: how it ended, and what to do next."""
    from rich.text import Text

    from daemon.job_view.deliveries import delivery_facts
    from daemon.sentence import without_advice
    from daemon.terminal.console import say
    from daemon.terminal.format import money, short_id, span
    from daemon.terminal.sanitize import plain

    for watched in jobs.all:
        row = watched.row
        name = short_id(row.job_id)
        if row.state == "completed":
            words = f"{name} completed in {span(row.run_seconds)}, {money(row.cost)}: "
            say(Text.assemble(("✓ ", "bold green"), words, (f"brightrun-trainer download {name}", "bold")))
            for kind, state in delivery_facts(row):
                say(f"  {kind}: {state}")
            continue
        reason = ""
        if row.state == "failed" and row.error_message:
            reason = f": {plain(without_advice(row.error_message, row.error_hint))}"
        say(Text.assemble(("✗ ", "bold red"), f"{name} {row.state}{reason}"))
        if row.state == "failed" and row.error_hint:
            say(Text(f"  → {plain(row.error_hint)}", style="bold"))
