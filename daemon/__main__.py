"""The command `brightrun-trainer`: parses words, builds the collaborators, and nothing else.

This is the composition root: every object that holds a connection, process or file is built here.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from daemon.errors import EXIT_UNFIT, DatabaseAway, HostUnfit

app = typer.Typer(
    name="brightrun-trainer",
    help="Insert a row. Get an adapter. Fine-tuning from a Postgres table.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def run() -> None:
    """Serve the queue on this host until told to stop.

    TERM drains: a checkpoint, then the jobs go back to the queue. A second TERM does not wait.
    USR1 finishes the jobs at hand first.
    """
    from daemon.service import serve
    from daemon.settings import load_settings

    asyncio.run(serve(load_settings()))


@app.command()
def migrate(
    local: Annotated[
        bool, typer.Option("--local", help="A plain Postgres: first create what Supabase would have (roles, auth).")
    ] = False,
) -> None:
    """Bring the database up to date; keeps its record where `supabase db push` keeps it."""
    from daemon.migrate import migrate as apply
    from daemon.settings import load_settings

    applied = apply(load_settings().database_url.get_secret_value(), local=local)
    typer.echo("\n".join(f"applied {name}" for name in applied) or "already up to date")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a screen.")] = False,
) -> None:
    """Say whether this host can work, and for each fault what to do. Exit status 1 when anything is red."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from daemon.doctor import Finding, Light, run_doctor
    from daemon.logs import configure_logs
    from daemon.settings import load_settings

    settings = load_settings()
    configure_logs("error")
    console = Console(soft_wrap=True)
    colours = {Light.GREEN: "green", Light.YELLOW: "yellow", Light.RED: "red"}

    def show(finding: Finding) -> None:
        if as_json:
            typer.echo(json.dumps(asdict(finding)))
            return
        light = f"[{colours[finding.light]}]●[/]"
        console.print(f"{light} [bold]{finding.name:<22}[/] {escape(' '.join(finding.detail.split()))}")
        if finding.advice:
            console.print(f"    → {escape(finding.advice)}", style=colours[finding.light])

    raise typer.Exit(run_doctor(settings, show))


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Your own conversations, JSONL of messages.")] = None,
) -> None:
    """Train a small model on this machine, from one inserted row, with an embedded Postgres."""
    from daemon.demo.run import run_demo

    raise typer.Exit(run_demo(data))


def main() -> None:
    """Run a command; what the user can mend is said in one line, without a traceback."""
    try:
        app()
    except HostUnfit as unfit:
        typer.echo(f"brightrun-trainer: {unfit}", err=True)
        sys.exit(EXIT_UNFIT)
    except DatabaseAway as away:
        typer.echo(f"brightrun-trainer: the database does not answer: {away}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
