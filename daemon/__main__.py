"""The command `brightrun-trainer`: its subcommands, and the message that is printed when one of them fails.

The composition root of the command line: each subcommand is a function of daemon.cli, which imports what it
needs when it is called, so that `--help` and shell completion stay fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from daemon.cli.commands import adapters, chat, check, compare, export, host, jobs, models, push, submit, watch
from daemon.cli.commands import logs as trainer_logs
from daemon.errors import TrainerError

app = typer.Typer(
    name="brightrun-trainer",
    help="Insert a row. Get an adapter. Fine-tuning from a Postgres table.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_WORDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Jobs": (
        submit.submit,
        jobs.jobs,
        jobs.show,
        watch.watch,
        jobs.events,
        trainer_logs.logs,
        jobs.cancel,
        jobs.retry,
        adapters.redeliver,
        jobs.release_held,
    ),
    "Models and data": (check.check, adapters.download, chat.chat, compare.compare, export.export, push.push),
    "Hosts and database": (
        host.run,
        host.serve,
        host.fleet,
        host.workers,
        host.drain,
        host.doctor,
        host.migrate,
        host.demo,
        host.playground,
    ),
}
for _panel, _words in _WORDS.items():
    for _word in _words:
        app.command(rich_help_panel=_panel)(_word)
app.add_typer(models.app, rich_help_panel="Models and data")


def main() -> None:
    """Runs a command. An error that the user can fix is printed in one line, without a traceback."""
    try:
        app(prog_name="brightrun-trainer")
    except TrainerError as error:
        from daemon.cli.errors import report_failure

        sys.exit(report_failure(error))


if __name__ == "__main__":
    main()
