"""The commands that show and move jobs: jobs, show, events, cancel, retry, release-held."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.queue.states import State

if TYPE_CHECKING:
    from uuid import UUID

    from rich.table import Table
    from rich.text import Text

    from daemon.cli.data.connection import Connection
    from daemon.cli.data.queries import JobDetails
    from daemon.job_view.reads import Event, JobRow

JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id, or its first characters (four or more).")]
JobIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Job ids, or their first characters.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]

# `lost` is the name in the views for a job whose host was silent until its lease expired.
STATES = (*State, "lost")

# Wide enough for all columns; a narrower terminal gets the most important ones.
_WIDE = 110
# Half a split screen: show the remark instead of a bar and a cut-off model name.
_NARROW = 72
_FOLLOW_SECONDS = 1.0


def _complete_states(incomplete: str) -> list[str]:
    return [state for state in STATES if state.startswith(incomplete)]


def jobs(
    states: Annotated[
        list[str] | None,
        typer.Option(
            "--state", "-s", help="Only jobs in this state; may be repeated.", autocompletion=_complete_states
        ),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", help="Only this owner's jobs: id or e-mail address.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Only this base model, or part of its name.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Show at most this many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs: unfinished ones first, then the newest, and why each waits."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.users import find_owner
    from daemon.cli.errors import Misused
    from daemon.job_view.reads import list_jobs
    from daemon.terminal.console import console, print_json, say, say_aside

    for state in states or ():
        if state not in STATES:
            raise Misused(f"{state!r} is not a state", f"use one of {', '.join(STATES)}")
    with open_database() as connection:
        user_id = None if user is None else find_owner(connection, user)
        rows = list_jobs(connection, states=states or None, user_id=user_id, model=model, limit=limit)
    if as_json:
        for row in rows:
            print_json(row)
        return
    if not rows:
        filtered = states or user or model
        say("no job matches" if filtered else "no jobs yet; `brightrun-trainer submit FILE` makes one")
        return
    screen = console()
    screen.print(_jobs_table(rows, screen.width))
    if len(rows) == limit:
        say_aside(f"the first {limit}; --limit shows more")


def show(job: JobId, as_json: AsJson = False) -> None:
    """Show one job: row, spec, events, answers before and after training, error with its hint."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import find_job, read_details, read_job
    from daemon.job_view.reads import read_story
    from daemon.terminal.console import print_json

    with open_database() as connection:
        job_id = find_job(connection, job)
        row = read_job(connection, job_id)
        details = read_details(connection, job_id)
        story = read_story(connection, [job_id])
    if as_json:
        whole = dataclasses.asdict(row) | dataclasses.asdict(details)
        print_json(whole | {"story": [dataclasses.asdict(event) for event in story]})
        return
    _print_job(row, details, story)


def events(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """List a job's events, one per line."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.notifications import listen, wait_for_change
    from daemon.cli.data.queries import find_job, read_job
    from daemon.job_view.event_lines import event_line
    from daemon.job_view.reads import EVENTS_A_READ, read_story
    from daemon.terminal.console import print_json, say

    with open_database() as connection:
        job_id = find_job(connection, job)
        listen(connection)
        after = 0
        while True:
            # Read the row before the events: if the row is final, the events read after it are complete.
            over = read_job(connection, job_id).is_final
            lines = read_story(connection, [job_id], after)
            for event in lines:
                after = event.id
                if as_json:
                    print_json(event)
                else:
                    say(event_line(event))
            if len(lines) == EVENTS_A_READ:
                continue
            if over or not follow:
                return
            wait_for_change(connection, _FOLLOW_SECONDS)


def cancel(wanted: JobIds, as_json: AsJson = False) -> None:
    """Cancel queued or running jobs. Cancelling twice is no error."""
    _move("cancel_training_job", wanted, "cancelled", as_json)


def retry(wanted: JobIds, as_json: AsJson = False) -> None:
    """Put failed or cancelled jobs back into the queue. A job continues from its checkpoint if there still is one."""
    _move("retry_training_job", wanted, "queued again", as_json)


def release_held(as_json: AsJson = False) -> None:
    """Release the jobs that were queued before the trainer was installed."""
    from daemon.cli.data.connection import open_database
    from daemon.terminal.console import print_json, say, say_done
    from daemon.terminal.format import count

    with open_database() as connection:
        row = connection.execute("SELECT public.release_held_jobs() AS released").fetchone()
    released = int(row["released"]) if row else 0
    if as_json:
        print_json({"released": released})
    elif released:
        say_done(f"{count(released, 'held job')} released into the queue")
    else:
        say("no job is held")


def _move(function: str, wanted: list[str], done: str, as_json: bool) -> None:
    """Calls one of the database's functions for each job. Continues after a refusal, and reports it at the end."""
    from daemon.cli.data.connection import open_database, said_plainly
    from daemon.cli.data.queries import find_job
    from daemon.cli.errors import CommandFailed
    from daemon.terminal.console import print_json, say_done

    refused: list[CommandFailed] = []
    with open_database() as connection:
        # Find all ids first: if one is mistyped, no job is moved.
        ids = dict.fromkeys(find_job(connection, one) for one in wanted)
        for job_id in ids:
            try:
                with said_plainly():
                    answer = _call(connection, function, job_id)
            except CommandFailed as error:
                refused.append(CommandFailed(f"job {job_id}: {error.message}", error.hint))
                continue
            if as_json:
                print_json(answer)
            else:
                say_done(f"{job_id} {done}")
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise CommandFailed("; ".join(error.message for error in refused), refused[0].hint)


def _call(connection: Connection, function: str, job_id: UUID) -> object:
    row = connection.execute(f"SELECT public.{function}(%(job_id)s) AS answer".encode(), {"job_id": job_id}).fetchone()
    assert row is not None, "a function gives a row"
    return row["answer"]


# -- how jobs look ----------------------------------------------------------------------------------------------


def _jobs_table(rows: list[JobRow], width: int) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from daemon.terminal.console import columns_table, state_text
    from daemon.terminal.format import age, short_id
    from daemon.terminal.sanitize import plain

    wide, narrow = width >= _WIDE, width < _NARROW
    table = columns_table()
    # Fixed width for columns that must not be cut; model and remark share the rest.
    table.add_column("ID", no_wrap=True, style="cyan", min_width=8)
    table.add_column("STATE", no_wrap=True, min_width=14)
    if wide:
        table.add_column("STAGE", no_wrap=True, min_width=11)
    if narrow:
        table.add_column("DONE", no_wrap=True, min_width=5)
    else:
        table.add_column("PROGRESS", no_wrap=True, min_width=22 if wide else 12)
        table.add_column("MODEL", no_wrap=True, overflow="ellipsis", max_width=40 if wide else 16)
    table.add_column("AGE", no_wrap=True, justify="right", min_width=3)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for row in rows:
        percent = f"{row.progress:3.0f} %"
        cells: list[Text | Table] = [Text(short_id(row.job_id)), state_text(row.state)]
        if wide:
            cells.append(Text(plain(row.stage) if row.state in ("initializing", "running", "lost") else ""))
        if narrow:
            cells.append(Text(percent))
        else:
            bar = Table.grid(padding=(0, 1))
            width_of_bar = 16 if wide else 6
            bar.add_row(
                ProgressBar(total=100.0, completed=row.progress, width=width_of_bar, complete_style="green"), percent
            )
            model = plain(row.model or "(default)")
            cells += [bar, Text(model if wide else model.rpartition("/")[2])]
        cells += [Text(age(row.age_seconds)), Text(_remark(row, with_stage=not wide), style="dim")]
        table.add_row(*cells)
    return table


def _remark(row: JobRow, *, with_stage: bool) -> str:
    """The most useful remark about a job in its state."""
    from daemon.terminal.format import money, span
    from daemon.terminal.sanitize import plain

    if row.state == "queued":
        return plain(row.waiting_reason or "")
    if row.state == "failed":
        return plain(row.error_code or "")
    if row.state == "completed":
        return f"in {span(row.run_seconds)}, {money(row.cost)}"
    if row.state in ("initializing", "running"):
        left = f"{span(row.seconds_left)} left" if row.seconds_left is not None else ""
        return left or (plain(row.stage) if with_stage else "")
    return ""


def _print_job(row: JobRow, details: JobDetails, story: list[Event]) -> None:
    from rich.panel import Panel
    from rich.text import Text

    from daemon.job_view.event_lines import event_line
    from daemon.sentence import without_advice
    from daemon.terminal.console import console, say, state_text
    from daemon.terminal.sanitize import plain, plain_lines

    screen = console()
    head = Text.assemble((str(row.job_id), "bold"), "  ", state_text(row.state))
    if not row.is_final and row.state != "queued":
        head.append(f" · {plain(row.stage)}")
    screen.print(head)
    screen.print(_facts(row, details))
    _print_settings(details)
    if row.error_message:
        words = Text(plain_lines(without_advice(row.error_message, row.error_hint)))
        if row.error_hint:
            words.append(f"\n→ {plain_lines(row.error_hint)}", "bold")
        title = Text(f" {plain(row.error_code or 'error')} ")
        style = "red" if row.state in ("failed", "lost") else "yellow"
        screen.print(Panel(words, title=title, title_align="left", border_style=style))
        if row.state != "failed":
            say(Text("  of an earlier attempt", style="dim"))
    _print_samples(story)
    screen.print()
    screen.print(Text("story", style="dim"))
    for event in story:
        if event.kind != "sample":
            screen.print(event_line(event, width=screen.width if screen.is_terminal else None), soft_wrap=True)


def _facts(row: JobRow, details: JobDetails) -> Table:
    from daemon.job_view.deliveries import delivery_facts
    from daemon.terminal.console import facts_table
    from daemon.terminal.format import clock, loss, money, size, span
    from daemon.terminal.sanitize import plain

    table = facts_table()

    def fact(name: str, value: object) -> None:
        if value not in (None, ""):
            table.add_row(name, plain(value))

    fact("model", row.model or "(the service's default)")
    fact("dataset", " · ".join(plain(part) for part in (details.dataset_name, details.dataset_source) if part))
    fact("owner", row.user_id)
    fact("caller's id", details.client_job_id)
    if details.trained_with is None:
        fact("spec", _inline(details.hyperparameters))
    fact("hardware", _inline(details.gpu_config))
    if row.waiting_reason:
        fact("waits", row.waiting_reason)
    if details.run_after is not None and row.state == "queued":
        fact("not before", clock(details.run_after))
    if details.deadline_at is not None:
        fact("deadline", clock(details.deadline_at))
    fact("queued", f"{clock(row.queued_at)} ({span(row.age_seconds)} ago)")
    if row.started_at is not None:
        fact("started", f"{clock(row.started_at)} (waited {span((row.started_at - row.queued_at).total_seconds())})")
    if row.is_final and row.run_seconds is not None:
        fact("ended", f"{clock(row.completed_at)} (ran {span(row.run_seconds)})")
    if row.attempt:
        fact("attempt", f"{row.attempt} of {row.max_attempts}")
    if row.total_steps:
        fact("progress", f"{row.progress:.0f} %, step {row.step} of {row.total_steps}, epoch {row.epoch}")
    if row.metric("training_loss") is not None:
        fact("loss", loss(row.metric("training_loss")) + _validation(row))
    limit = f" of at most {money(details.max_cost)}" if details.max_cost is not None else ""
    fact("cost", f"{money(row.cost)}{limit}" if row.cost is not None else None)
    fact("held by", details.worker_id)
    fact("adapter", row.adapter_path)
    if details.adapter_sha256:
        fact("", f"{size(details.adapter_bytes)}, sha256 {details.adapter_sha256}")
    for name, words in delivery_facts(row):
        fact(name, words)
    return table


def _validation(row: JobRow) -> str:
    from daemon.terminal.format import loss

    value = row.metric("validation_loss")
    return "" if value is None else f", on held-out conversations {loss(value)}"


def _inline(value: object) -> str:
    """Formats a JSON object as `key value, key value`, anything else as JSON."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return ", ".join(f"{key} {item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items())


def _print_settings(details: JobDetails) -> None:
    """Prints what was asked for beside what it is trained with; nothing until an attempt knows that."""
    from daemon.report.trained_with import asked_and_used, setting_in_words
    from daemon.terminal.console import columns_table, console
    from daemon.terminal.sanitize import plain

    settings = asked_and_used(details.hyperparameters, details.gpu_config, details.trained_with)
    if not settings:
        return
    table = columns_table()
    table.add_column("SETTING", no_wrap=True, style="dim")
    table.add_column("ASKED", overflow="fold")
    table.add_column("USED", overflow="fold")
    for name, asked, used in settings:
        table.add_row(plain(name), plain(setting_in_words(asked)), plain(setting_in_words(used)))
    screen = console()
    screen.print()
    screen.print(table)


def _print_samples(story: list[Event]) -> None:
    """Prints the answers before and after training, by prompt."""
    from daemon.terminal.console import console, facts_table
    from daemon.terminal.sanitize import plain, plain_lines

    answers: dict[str, dict[str, str]] = {}
    for event in story:
        if event.kind == "sample":
            prompt = str(event.data.get("prompt", ""))
            answers.setdefault(prompt, {})[str(event.data.get("when"))] = str(event.data.get("answer", ""))
    if not answers:
        return
    screen = console()
    for prompt, by_time in answers.items():
        screen.print()
        table = facts_table()
        table.add_row("asked", plain(prompt))
        for when in ("before", "after"):
            if when in by_time:
                table.add_row(when, plain_lines(by_time[when].strip()))
        screen.print(table)
