"""The commands for base models on this host: pull, list, verify, quantize. None of them uses the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from daemon.base_model.inventory import FoundModel
    from daemon.settings import Settings

app = typer.Typer(name="models", help="Base models on this host.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]


def _complete_models(incomplete: str) -> list[str]:
    from daemon.base_model.inventory import list_models
    from daemon.errors import HostUnfit

    try:
        return [model.name for model in list_models(model_settings()) if model.name.startswith(incomplete)]
    except HostUnfit:
        return []


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Its name on the hub: ORG/NAME.", autocompletion=_complete_models)
]


@app.command()
def pull(model: ModelName, as_json: AsJson = False) -> None:
    """Download a model from the hub into TRAINER_MODELS_DIR, continuing an interrupted download.

    Disk space is checked first.
    """
    import asyncio

    from daemon.base_model.pull import pull_model
    from daemon.terminal.console import print_json, say_done
    from daemon.terminal.progress_bar import transfer_bar

    settings = model_settings()
    with transfer_bar(model, shown=not as_json) as progress:
        pulled = asyncio.run(pull_model(model, settings, progress))
    if as_json:
        print_json(pulled)
    else:
        say_done(f"{pulled.name} is whole in {pulled.path}" + (f" ({pulled.revision[:12]})" if pulled.revision else ""))


@app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """List the model folders that jobs would use, and what is wrong with each."""
    from rich.text import Text

    from daemon.base_model.inventory import list_models
    from daemon.terminal.console import columns_table, console, print_json, say
    from daemon.terminal.format import size
    from daemon.terminal.sanitize import plain

    settings = model_settings()
    found = list_models(settings)
    if as_json:
        for model in found:
            print_json(model)
        return
    if not found:
        say(f"no model under {settings.models_dir}; `brightrun-trainer models pull ORG/NAME` fetches one")
        return
    table = columns_table()
    table.add_column("MODEL", no_wrap=True, overflow="ellipsis")
    table.add_column("SIZE", no_wrap=True, justify="right", min_width=8)
    table.add_column("STATE", no_wrap=True, min_width=8)
    table.add_column("WHERE", overflow="fold")
    for model in found:
        state = Text("● whole", style="green") if not model.faults else Text("● broken", style="red")
        table.add_row(Text(plain(model.name)), size(model.bytes), state, Text(plain(model.path), style="dim"))
    console().print(table)
    for model in found:
        for fault in model.faults:
            say(Text(f"{plain(model.name)}: {plain(fault)}", style="red"))


@app.command()
def verify(model: ModelName, as_json: AsJson = False) -> None:
    """Read every file of a model and compare sizes and known hashes. Exit status 1 if there is any fault."""
    from daemon.base_model.inventory import verify_model
    from daemon.cli.errors import EXIT_FAILED
    from daemon.terminal.console import print_json, say, say_done
    from daemon.terminal.progress_bar import transfer_bar
    from daemon.terminal.sanitize import plain

    settings = model_settings()
    known = _folder_of(model, settings)
    total = known.bytes if known else 0
    done = 0
    with transfer_bar(model, shown=not as_json, verb="reading") as progress:

        def on_file(_name: str, num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress(done, max(total, done))

        faults = verify_model(model, settings, on_file)
    if as_json:
        print_json({"model": model, "path": known.path if known else None, "faults": faults})
    elif faults:
        for fault in faults:
            say(f"✗ {plain(fault)}")
        say(f"  → `brightrun-trainer models pull {model}` completes it")
    else:
        say_done(f"{model} is whole" + (f" in {known.path}" if known else ""))
    if faults:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def quantize(
    model: ModelName,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Delete the 16-bit weights once the copy is verified. This cannot be undone."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before deleting.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the 4-bit copy now, so that the first job loads a quarter of the bytes. Takes as long as one full load.

    With --replace only the copy is kept. It works with these library versions and this kind of device; after an
    update of the libraries the model must be pulled again.
    """
    from pathlib import Path

    from daemon.base_model.replace_weights import replace_weights
    from daemon.cli.errors import CommandFailed
    from daemon.terminal.console import print_json, say_done
    from daemon.terminal.format import size

    settings = model_settings()
    folder = local_model(model, settings)
    if folder is None:
        raise CommandFailed(
            f"the model {model} is incomplete on this host", f"run `brightrun-trainer models pull {model}`"
        )
    if replace and not yes:
        _confirm_replacing(model, folder)
    answer = _make_copy(model, folder, settings)
    if replace:
        copy = Path(str(answer["path"]))
        answer["freed_bytes"] = replace_weights(folder, copy)
        answer["path"] = str(folder)
    if as_json:
        print_json(answer)
        return
    was = "was there already" if answer["made_before"] else "is made"
    say_done(f"the 4-bit copy of {model} {was}: {size(answer['bytes'])} in {answer['path']}")
    if replace:
        say_done(f"it is all that is kept: {size(answer['freed_bytes'])} of 16-bit weights are deleted")


def _confirm_replacing(model: str, folder: Path) -> None:
    import sys

    from daemon.base_model.replace_weights import weights_of
    from daemon.cli.errors import Misused
    from daemon.terminal.format import size

    doomed = sum(path.stat().st_size for path in weights_of(folder))
    what = f"--replace deletes the {size(doomed)} of 16-bit weights of {model} in {folder}"
    if not sys.stdin.isatty():
        raise Misused(what, "add --yes to confirm it without a terminal")
    typer.confirm(f"{what}, once the 4-bit copy is made and verified. Go on?", abort=True, err=True)


def _make_copy(model: str, folder: Path, settings: Settings) -> dict[str, Any]:
    """Lets the trainer load the model, which writes the copy."""
    import json
    import subprocess
    import sys

    from daemon.cli.data.trainer_process import trainer_environment
    from daemon.cli.errors import CommandFailed
    from daemon.host.gpus import find_gpus
    from daemon.settings import quantized_dir
    from daemon.terminal.console import console

    device = "cuda" if settings.device != "cpu" and find_gpus() else "cpu"
    command = [
        sys.executable,
        "-m",
        "training.base.make_quantized_copy",
        str(folder),
        model,
        str(quantized_dir(settings)),
        device,
    ]
    command.append(settings.compute_type)
    with console(stderr=True).status(f"quantising {model} …"):
        ended = subprocess.run(command, env=trainer_environment(), capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines()
    if not lines:
        last = ended.stderr.strip().splitlines()[-1:] or ["no output"]
        raise CommandFailed(f"the trainer exited with code {ended.returncode}: {last[0][:300]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if not answer["ok"]:
        raise CommandFailed(answer["message"], answer["hint"])
    return answer


def _folder_of(model: str, settings: Settings) -> FoundModel | None:
    from daemon.base_model.inventory import list_models

    return next((found for found in list_models(settings) if found.name == model), None)


def model_settings() -> Settings:
    """Loads only the settings that models need: a host may download models before it has a database."""
    from daemon.database.url import NO_DATABASE
    from daemon.read_settings import load_settings

    return load_settings(database_url=NO_DATABASE, storage="folder")


def local_model(name: str, settings: Settings) -> Path | None:
    """The folder of a whole model on this host; None if there is none. Never downloads."""
    import asyncio

    from daemon.base_model.resolve import resolve_model
    from daemon.errors import JobFailed
    from daemon.logs import configure_logs
    from daemon.read_settings import secrets_of

    configure_logs("error", secrets=secrets_of(settings))
    here = settings.model_copy(update={"model_downloads": False, "allowed_models": ()})
    try:
        return asyncio.run(resolve_model(name, here)).path
    except JobFailed:
        return None
