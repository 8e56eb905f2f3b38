"""The operator's commands: serve the queue, prepare the database, list the hosts, drain one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from daemon.cli.data.queries import ListedWorker
    from daemon.schema.fronts import Front

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]

_WIDE = 110


def run() -> None:
    """Serve the queue on this host until a signal stops it.

    TERM shuts down: each job saves a checkpoint and goes back to the queue. A second TERM does not wait for
    that. USR1 finishes the running jobs first. If stderr is not a terminal, each log line is JSON
    (TRAINER_LOG_FORMAT decides).
    """
    from daemon.service import run_service

    run_service()


def serve() -> None:
    """Serve the HTTP gateway: the dashboard, and the older contracts for callers that cannot insert a row.

    If stderr is not a terminal, each log line is JSON (TRAINER_LOG_FORMAT decides).
    """
    import asyncio

    from daemon.gateway.server import serve_gateway
    from daemon.read_settings import load_settings

    asyncio.run(serve_gateway(load_settings()))


def fleet() -> None:
    """Run the fleet loop: start pods when jobs wait that no host can take, and end pods that are not useful.

    Runs on any small host. TRAINER_FLEET_POD defines the pod. SIGTERM stops the loop; pods keep running.
    If stderr is not a terminal, each log line is JSON (TRAINER_LOG_FORMAT decides).
    """
    from daemon.fleet.loop import run_fleet
    from daemon.read_settings import load_settings

    run_fleet(load_settings())


def migrate(
    local: Annotated[
        bool, typer.Option("--local", help="For a plain Postgres: first create what Supabase has (roles, auth).")
    ] = False,
    front: Annotated[
        list[str] | None,
        typer.Option(help="Also make this table of the app a front of the queue, for example `pipeline`."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model of the jobs that come in by that front.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Apply missing migrations and repair the database after a restore; safe at any time.

    Applied migrations are recorded where `supabase db push` records them. A front, once applied, is verified and
    repaired with the rest.
    """
    from daemon.cli.data.connection import database_url
    from daemon.schema.migrations import bring_up_to_date
    from daemon.terminal.console import print_json

    chosen = _choose_fronts(front or [], base_model)
    done = bring_up_to_date(database_url(), local=local, fronts=chosen, base_model=base_model)
    if as_json:
        print_json({"applied": done.applied, "repaired": done.repaired, "warnings": done.warnings})
        return
    lines = [*(f"applied {name}" for name in done.applied), *(f"repaired: {words}" for words in done.repaired)]
    typer.echo("\n".join(lines) or "already up to date")
    for words in done.warnings:
        typer.echo(f"warning: {words}", err=True)


def _choose_fronts(names: list[str], base_model: str | None) -> list[Front]:
    from daemon.cli.errors import Misused
    from daemon.schema.fronts import fronts
    from training.spec import MODEL_NAME

    known = fronts()
    if unknown := [name for name in names if name not in known]:
        raise Misused(f"there is no front called {unknown[0]}", f"choose one of: {', '.join(known)}")
    if base_model is not None and not names:
        raise Misused("--base-model belongs to a front", "name the front as well: --front pipeline")
    if base_model is not None and not re.fullmatch(MODEL_NAME, base_model):
        raise Misused(f"{base_model!r} is not the name of a model", "name it as the hub does: organisation/name")
    return [known[name] for name in names]


def doctor(as_json: AsJson = False) -> None:
    """Check whether this host can work and say for each fault what to do. Exit status 1 if anything is red."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from daemon.doctor.check_result import CheckResult, Status
    from daemon.doctor.run import run_doctor
    from daemon.logs import configure_logs
    from daemon.read_settings import load_settings, secrets_of

    settings = load_settings()
    configure_logs("error", secrets=secrets_of(settings))
    console = Console(soft_wrap=True)
    colours = {Status.GREEN: "green", Status.YELLOW: "yellow", Status.RED: "red"}
    # Different also without colours, as in a pod's log.
    signs = {Status.GREEN: "●", Status.YELLOW: "▲", Status.RED: "✖"}
    seen = dict.fromkeys(Status, 0)

    def show(finding: CheckResult) -> None:
        seen[finding.light] += 1
        if as_json:
            typer.echo(json.dumps(asdict(finding)))
            return
        light = f"[{colours[finding.light]}]{signs[finding.light]}[/]"
        console.print(f"{light} [bold]{finding.name:<22}[/] {escape(' '.join(finding.detail.split()))}")
        if finding.advice:
            console.print(f"    → {escape(finding.advice)}", style=colours[finding.light])

    status = run_doctor(settings, show)
    if not as_json:
        verdict = "this host cannot work yet" if status else "this host can work"
        console.print(f"\n{verdict}: {seen[Status.RED]} red, {seen[Status.YELLOW]} yellow, {seen[Status.GREEN]} green")
    raise typer.Exit(status)


def demo(
    data: Annotated[Path | None, typer.Option(help="Your own conversations, JSONL of messages.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small model on this machine, from one inserted row, with an embedded Postgres."""
    from daemon.demo.run import run_demo

    raise typer.Exit(run_demo(data, as_json=as_json))


def playground(as_json: AsJson = False) -> None:
    """Run the whole service here until Ctrl-C, to try things: Postgres, a host and the dashboard."""
    from daemon.demo.playground import run_playground

    raise typer.Exit(run_playground(as_json=as_json))


def workers(
    everyone: Annotated[bool, typer.Option("--all", "-a", help="Also list hosts that have left.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the hosts: what each is, what it does, and when it was last seen."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import list_workers
    from daemon.terminal.console import console, print_json, say

    with open_database() as connection:
        rows = list_workers(connection, everyone=everyone)
    if as_json:
        for row in rows:
            print_json(row)
        return
    if not rows:
        say("no host serves this queue; `brightrun-trainer run` makes this one serve it")
        return
    screen = console()
    screen.print(_workers_table(rows, screen.width))
    for row in rows:
        if row.state in ("gone", "lost"):
            continue  # its last load is out of date
        for trouble in row.troubles:
            screen.print(_trouble_line(row, trouble))


def drain(
    worker: Annotated[
        str | None,
        typer.Argument(metavar="WORKER", help="A host's name, or its worker id's first characters (`workers`)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Drain a host: it claims nothing more, finishes its jobs and ends. Without a name, drain the only host."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import list_workers
    from daemon.database.statements import statement
    from daemon.terminal.console import print_json, say_done
    from daemon.terminal.format import count

    with open_database() as connection:
        chosen = _choose_worker(list_workers(connection), worker)
        connection.execute(statement("drain_worker").encode(), {"id": chosen.worker_id})
    if as_json:
        print_json({"worker_id": chosen.worker_id, "host": chosen.host, "jobs": chosen.jobs})
        return
    work = f"ends after {count(len(chosen.jobs), 'job')}" if chosen.jobs else "ends"
    say_done(f"{chosen.worker_id} drains: it hears of it within ten seconds, claims nothing more and {work}")


def _choose_worker(rows: list[ListedWorker], wanted: str | None) -> ListedWorker:
    from daemon.cli.errors import Misused

    living = [row for row in rows if row.state in ("idle", "busy", "draining", "out_of_service")]
    if wanted is not None:
        key = wanted.lower()
        living = [row for row in living if key in (row.host.lower(), row.pod) or str(row.worker_id).startswith(key)]
    if len(living) == 1:
        return living[0]
    whose = "no live host" if wanted is None else f"no live host is called {wanted}"
    if not living:
        raise Misused(whose, "`workers` lists them")
    listed = ", ".join(f"{str(row.worker_id)[:8]} ({row.host})" for row in living)
    raise Misused(f"several hosts could be meant: {listed}", "name one by its worker id")


def _workers_table(rows: list[ListedWorker], width: int) -> Table:
    from rich.text import Text

    from daemon.terminal.console import columns_table
    from daemon.terminal.format import age, short_id
    from daemon.terminal.sanitize import plain

    styles = {
        "idle": "green",
        "busy": "bold green",
        "draining": "yellow",
        "out_of_service": "red",
        "lost": "red",
        "gone": "dim",
    }
    wide = width >= _WIDE
    table = columns_table()
    table.add_column("WORKER", no_wrap=True, style="cyan")
    table.add_column("HOST", no_wrap=True, overflow="ellipsis", max_width=40 if wide else 18)
    table.add_column("STATE", no_wrap=True)
    table.add_column("HARDWARE", no_wrap=True, overflow="ellipsis")
    table.add_column("JOBS", no_wrap=True)
    table.add_column("SEEN", no_wrap=True, justify="right")
    if wide:
        table.add_column("UP", no_wrap=True, justify="right")
        table.add_column("VERSION", no_wrap=True)
    for row in rows:
        # A lease shows a job sooner than the daemon's row, which is updated every ten seconds.
        state = "busy" if row.state == "idle" and row.jobs else row.state
        style = styles.get(state, "white")
        holding = " ".join(short_id(job) for job in row.jobs[:2]) + (" …" if len(row.jobs) > 2 else "")
        cells = [
            Text(short_id(row.worker_id)),
            Text(plain(row.host)),
            Text.assemble(("● ", style), (plain(state).replace("_", " "), style)),
            Text(_hardware(row)),
            Text(f"{len(row.jobs)}/{row.slots}" + (f" {holding}" if wide and holding else "")),
            Text(f"{age(row.silent_seconds)} ago"),
        ]
        if wide:
            cells += [Text(age(row.up_seconds)), Text(plain(row.versions.get("brightrun-trainer", "")))]
        table.add_row(*cells)
    return table


def _trouble_line(row: ListedWorker, trouble: dict[str, Any]) -> Text:
    from rich.text import Text

    from daemon.terminal.sanitize import plain

    name, message = plain(str(trouble.get("name", ""))), plain(str(trouble.get("message", "")))
    since = plain(str(trouble.get("since", "")))[:16].replace("T", " ")
    return Text.assemble((f"✗ {plain(row.host)}: {name}", "red"), f" since {since} UTC: {message}")


def _hardware(row: ListedWorker) -> str:
    from daemon.terminal.sanitize import plain

    if row.device == "cpu":
        return "CPU"
    memory = f" {row.gpu_memory_gb:.0f} GB" if row.gpu_memory_gb else ""
    return f"{row.gpu_count} × {plain(row.gpu_type or 'GPU')}{memory}"
