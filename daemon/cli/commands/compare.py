"""Compares a base model and adapters of it: the same prompts side by side, the same held-out conversations measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from daemon.cli.data.contestants import Entry
    from daemon.comparison.record import Verdict
    from daemon.comparison.results import Comparison

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: one object about all of it, then one per prompt.")]


def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="ID|FOLDER...", help="Completed jobs, or adapters' folders, of one base model."),
    ],
    *,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", "-p", help="A file of prompts; default: conversations that the jobs held out."),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option("--most", "-n", min=1, help="Most prompts; default: 10 held-out ones, or the whole file."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="A dataset to measure the loss on; default: what the jobs held out."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The base model's folder; default: found by its name.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 answers greedily: always the same.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of answers at a temperature above 0.")] = 0,
    quantize: Annotated[
        bool | None,
        typer.Option(help="The base model in 4 bits, as jobs train it; default: on a GPU, not on a CPU."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="URL", help="An OpenAI-compatible API whose model judges each pair of answers."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's model; its key is TRAINER_JUDGE_KEY.")] = None,
    rubric: Annotated[str | None, typer.Option(help="What the judge shall prefer: a text, or a file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as one HTML file, to send or to upload.")] = None,
    store: Annotated[
        bool, typer.Option(help="Keep a comparison of jobs in the database, for the dashboard and for votes.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Ask a base model and adapters of it the same prompts, side by side, and measure their loss on held-out data."""
    from daemon.cli.commands.judging import ask_judge, check_judge
    from daemon.cli.comparison_screen import show_comparison
    from daemon.cli.errors import CommandFailed, Misused
    from daemon.terminal.console import print_json, say

    check_judge(judge, judge_model, rubric)
    if html is not None and not html.absolute().parent.is_dir():
        raise Misused(f"there is no folder {html.absolute().parent} for the HTML file")
    for file in (prompts, held_out):
        if file is not None and not file.is_file():
            raise Misused(f"there is no file {file}")
    with tempfile.TemporaryDirectory(prefix="brightrun-compare-") as scratch:
        entries, request, notes = _prepare(what, prompts, held_out, model, Path(scratch))
        request |= {"most_prompts": most, "max_new_tokens": max_tokens, "temperature": temperature, "seed": seed}
        request["quantize"] = quantize
        comparison = _run(entries, request, notes)
    judgement = ask_judge(comparison, judge, judge_model, rubric) if judge and judge_model else None
    kept = _store(comparison, entries, judgement.verdicts if judgement else ()) if store else None
    if as_json:
        for line in comparison.as_lines():
            print_json({"id": kept, **line} if line["kind"] == "comparison" else line)
    else:
        show_comparison(comparison)
        if kept is not None:
            say(f"kept as {kept} (dashboard: Comparisons)")
    if html is not None:
        _write(comparison, html)
    if judgement is not None and judgement.failure is not None:
        raise CommandFailed(judgement.failure, "the answers are complete; ask the judge again later")


def _prepare(
    what: list[str], prompts: Path | None, held_out: Path | None, model: Path | None, scratch: Path
) -> tuple[list[Entry], dict[str, Any], list[str]]:
    """Finds the adapters, their base model and their data. Returns the process' request, and notes."""
    from daemon.cli.commands.chat import find_base_model
    from daemon.cli.commands.models import model_settings
    from daemon.cli.data.contestants import entry_of_folder, fetch_data, one_base
    from daemon.cli.errors import CommandFailed, Misused
    from daemon.host.gpus import find_gpus
    from daemon.logs import configure_logs
    from daemon.read_settings import secrets_of
    from daemon.settings import quantized_dir

    configure_logs("error", secrets=secrets_of(model_settings()))
    folders = {name: Path(name) for name in what if Path(name).is_dir()}
    entries = [entry_of_folder(folders[name]) for name in what if name in folders]
    notes: list[str] = []
    data: dict[int, Path] = {}
    if any(name not in folders for name in what):
        entries, data, notes = _entries_with_data(what, folders, scratch, fetch_data)
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise Misused(f"an adapter is named twice: {', '.join(sorted(names))}", "name each once")
    if prompts is None and held_out is None and not data:
        raise Misused(
            "there are no prompts: " + (" ".join(notes) or "an adapter's folder holds none of its held-out data"),
            "give a file with --prompts, or --held-out for a dataset to ask from",
        )
    base = one_base(entries)
    if base is None and model is None:
        raise CommandFailed("no adapter says which base model it belongs to", "name its folder with --model")
    revisions = {entry.base_revision for entry in entries if entry.base_revision is not None}
    if len(revisions) > 1:
        notes.append(f"The adapters were trained on different revisions of {base}: {', '.join(sorted(revisions))}.")
    model_dir = model or find_base_model(next(entry.folder for entry in entries if entry.base_model == base)).path
    if not (model_dir / "config.json").is_file():
        raise CommandFailed(f"the folder {model_dir} holds no model: there is no config.json in it")
    request = {
        "base_model": base or model_dir.name,
        "model_path": model_dir.resolve(),
        "quantized_dir": quantized_dir(model_settings()),
        "device": "cuda" if find_gpus() else "cpu",
        "contestants": [
            {
                "name": entry.name,
                "adapter": entry.folder.resolve(),
                "dataset": data.get(place),
                "hyperparameters": entry.hyperparameters if place in data else None,
            }
            for place, entry in enumerate(entries)
        ],
        "prompts": prompts and prompts.resolve(),
        "held_out": held_out and held_out.resolve(),
        "today": next((entry.trained_on for entry in entries if entry.trained_on), None),
    }
    return entries, request, notes


def _entries_with_data(
    what: list[str], folders: dict[str, Path], scratch: Path, fetch_data: Any
) -> tuple[list[Entry], dict[int, Path], list[str]]:
    """Reads folders and jobs in the order in which they were named, and fetches the jobs' data."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.contestants import entry_of_folder, entry_of_job
    from daemon.cli.data.queries import job_digits
    from daemon.cli.errors import Misused
    from daemon.read_settings import load_settings

    for name in what:
        try:
            if name not in folders:
                job_digits(name)
        except Misused as error:
            raise Misused(f"{name[:80]!r} is neither an adapter's folder nor a job's id", error.hint) from None
    settings = load_settings()
    with open_database() as connection:
        entries = [
            entry_of_folder(folders[name]) if name in folders else entry_of_job(connection, name) for name in what
        ]
        data, notes = fetch_data(connection, entries, settings, scratch)
    return entries, data, notes


def _run(entries: list[Entry], request: dict[str, Any], notes: list[str]) -> Comparison:
    from daemon.cli.data.comparison_process import ask_process
    from daemon.comparison.results import Comparison, Contestant
    from daemon.terminal.console import console, say_aside

    adapters = [Contestant(entry.name, entry.job_id, entry.adapter_sha256, entry.about) for entry in entries]
    options = {
        "max_tokens": request["max_new_tokens"],
        "temperature": request["temperature"],
        "seed": request["seed"],
        "device": request["device"],
        "quantize": request["quantize"],
    }
    comparison = Comparison(request["base_model"], [Contestant("base"), *adapters], options, notes=list(notes))
    screen = console(stderr=True)
    with screen.status("starting …") as status:
        for said in ask_process(request):
            comparison.take(said)
            if (words := _progress(said, comparison)) is None:
                continue
            status.update(words)
            # In a log a line for each stage shows that it goes on; a terminal has the line that moves.
            if said["kind"] == "stage" and not screen.is_terminal:
                say_aside(words)
    return comparison


def _write(comparison: Comparison, file: Path) -> None:
    from daemon.cli.errors import CommandFailed
    from daemon.comparison.page import write_page

    try:
        write_page(comparison, file)
    except OSError as error:
        raise CommandFailed(f"the file {file} cannot be written: {error.strerror or error}") from error


def _store(comparison: Comparison, entries: list[Entry], verdicts: Sequence[Verdict]) -> UUID | None:
    """Keeps a comparison of one user's jobs. What cannot be kept is said and shown all the same."""
    from daemon.cli.data.connection import open_database
    from daemon.comparison.record import parameters
    from daemon.database.statements import statement
    from daemon.errors import TrainerError
    from daemon.terminal.console import say_aside

    owners = {entry.user_id for entry in entries if entry.user_id is not None}
    if not owners:
        return None
    if len(owners) > 1:
        comparison.notes.append("Not kept in the database: the jobs belong to different users.")
        return None
    try:
        with open_database() as connection:
            row = connection.execute(
                statement("record_comparison").encode(), parameters(comparison, next(iter(owners)), verdicts)
            ).fetchone()
    except TrainerError as error:
        say_aside(f"not kept in the database: {error}")
        return None
    assert row is not None
    kept: UUID = row["id"]
    return kept


def _progress(said: dict[str, Any], comparison: Comparison) -> str | None:
    if said["kind"] == "answer":
        who = said["contestant"]
        done = sum(prompt.answers[who] is not None for prompt in comparison.prompts)
        return f"{comparison.contestants[who].name}: {done} of {len(comparison.prompts)} answers …"
    if said["kind"] != "stage":
        return None
    who = comparison.contestants[said["contestant"]].name if "contestant" in said else ""
    match said["stage"]:
        case "reading":
            return "reading the data …"
        case "loading":
            return f"loading {comparison.base_model} …"
        case "answering":
            return f"{who}: answering …"
        case _:
            return f"{who}: measuring the loss …"
