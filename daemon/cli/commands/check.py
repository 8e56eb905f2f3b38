"""Checks whether a dataset or a job would be accepted, without a database, a GPU or an upload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from daemon.cli.data.preflight import PreflightReport
    from training.spec import ParsedRow

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A dataset, or a job's JSON: hyperparameters, gpu_config.")
    ],
    data: Annotated[Path | None, typer.Option("--data", help="For a job: the dataset to train on.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="For a dataset: the base model to count tokens for.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a dataset, or a job and its dataset, before submitting. Exit status 1 if it would fail.

    If the base model is on this host, count tokens and estimate memory and time; else check only the data.
    """
    from daemon.cli.data.preflight import judge_dataset
    from daemon.cli.errors import EXIT_FAILED, Misused
    from daemon.terminal.console import print_json

    job = _read_job(file)
    if job is None and data is not None:
        raise Misused(f"the file {file} is a dataset itself", "leave --data out")
    row, faults, unknown = _parse(
        job if job is not None else {"hyperparameters": {"base_model": model} if model else {}}
    )
    dataset = file if job is None else data
    verdict: PreflightReport | None = None
    if dataset is not None:
        verdict = judge(dataset, row) if row is not None else judge_dataset(dataset)
    misfits = endpoint_misfits(row) if row is not None and job is not None else None
    if misfits and row is not None and row.hyperparameters.deploy:
        # Such a job would not be trained.
        faults, misfits = [*faults, *misfits], ()
    ok = not faults and (verdict is None or verdict.ok)
    if as_json:
        print_json(
            {"ok": ok, "faults": faults, "unknown_keys": unknown, "dataset": verdict, "endpoint_misfits": misfits}
        )
    else:
        _print(file, faults, unknown, verdict, dataset)
        _print_misfits(misfits or ())
    if not ok:
        raise typer.Exit(EXIT_FAILED)


def judge(dataset: Path, row: ParsedRow) -> PreflightReport:
    """Checks the whole job if its model is on this host, else only the dataset, and says what was not checked."""
    from daemon.cli.commands.models import local_model, model_settings
    from daemon.cli.data.preflight import judge_dataset, judge_job

    settings = model_settings()
    name = row.hyperparameters.base_model or settings.default_model
    folder = local_model(name, settings)
    if folder is None:
        verdict = judge_dataset(dataset)
        return replace(verdict, remarks=(*verdict.remarks, _not_judged(name))) if verdict.ok else verdict
    return judge_job(dataset, row, name, folder, settings.device)


def endpoint_misfits(row: ParsedRow) -> tuple[str, ...] | None:
    """Returns why the endpoint of the settings could not serve the job's adapter; None where there is no endpoint."""
    import asyncio

    from daemon.cli.commands.models import model_settings
    from daemon.serving.fit import misfits

    settings = model_settings()
    if settings.endpoint_url is None or row.hyperparameters.deploy is False:
        return None
    name = row.hyperparameters.base_model or settings.default_model
    return asyncio.run(misfits(settings, name, row.hyperparameters))


def _not_judged(name: str) -> dict[str, str]:
    return {
        "code": "not_judged",
        "message": f"not judged, because the base model {name} is not on this host: tokens, memory and time, and its "
        f"chat template, which may refuse conversations; `brightrun-trainer models pull {name}` fetches it, --model "
        "names another",
    }


def print_verdict(verdict: PreflightReport, dataset: Path) -> None:
    """Prints faults in red, warnings in yellow, and counts."""
    from rich.text import Text

    from daemon.sentence import as_sentence
    from daemon.terminal.console import console, facts_table, say
    from daemon.terminal.sanitize import plain, plain_lines

    if not verdict.ok:
        for error in verdict.errors:
            say(Text.assemble(("✗ ", "bold red"), f"{dataset.name}: {as_sentence(plain_lines(error.get('message')))}"))
            if error.get("hint"):
                say(Text(f"  → {as_sentence(plain(error['hint']))}", style="bold"))
        return
    say(Text.assemble(("✓ ", "bold green"), f"{dataset.name} can be trained on"))
    table = facts_table()
    for name, value in facts(verdict):
        table.add_row(f"  {name}", plain(value))
    console().print(table)
    for remark in verdict.remarks:
        say(Text.assemble(("! ", "yellow"), as_sentence(plain(remark.get("message")))))


def facts(verdict: PreflightReport) -> list[tuple[str, str]]:
    """Returns what is known of a dataset that can be trained on, in words: less where the base model is not here."""
    from daemon.terminal.format import count, size, span

    data = verdict.data
    said = [("format", str(data["format"]))]
    if not verdict.tokens_are_counted:
        answers, conversations = count(data["answers"], "answer"), count(data["conversations"], "conversation")
        return [*said, ("holds", f"{answers} of {conversations}, {data['characters']:,} characters")]
    for name, side in (("to train on", "train"), ("held out", "validation")):
        if conversations := data[f"{side}_conversations"]:
            answers = count(data[f"{side}_answers"], "answer")
            said.append((name, f"{answers} of {count(conversations, 'conversation')}"))
    said += [
        ("tokens", f"{data['train_tokens']:,} an epoch, {100 * data['trained_share']:.0f} % of them in the answers"),
        ("of an example", f"{data['tokens_min']:,} to {data['tokens_max']:,} tokens, median {data['tokens_median']:,}"),
        ("max length", f"{data['max_length']:,} tokens"),
        ("steps", f"{data['total_steps']:,} in {count(data['total_epochs'], 'epoch')}"),
    ]
    if verdict.estimate is not None:
        said += [
            ("memory", f"about {size(verdict.estimate['memory_bytes'])}"),
            ("adapter", size(verdict.estimate["adapter_bytes"])),
            ("time", f"about {span(max(1.0, verdict.estimate['seconds']))}"),
        ]
    return said


def _print_misfits(misfits: tuple[str, ...]) -> None:
    from rich.text import Text

    from daemon.sentence import as_sentence
    from daemon.terminal.console import say
    from daemon.terminal.sanitize import plain

    for misfit in misfits:
        said = f"its adapter could be trained, but not served: {misfit}"
        say(Text.assemble(("! ", "yellow"), as_sentence(plain(said))))


def _read_job(file: Path) -> dict[str, Any] | None:
    """Reads a job's JSON (of the row, or of the older HTTP contract). None if it is something else: a dataset."""
    from daemon.cli.errors import Misused

    if not file.is_file():
        raise Misused(f"there is no file {file}")
    if file.stat().st_size > 1_000_000 and file.suffix != ".json":
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if isinstance(raw, dict) and isinstance(raw.get("input"), dict):
        raw = raw["input"]
    return raw if isinstance(raw, dict) and "hyperparameters" in raw else None


def _parse(job: dict[str, Any]) -> tuple[ParsedRow | None, list[str], tuple[str, ...]]:
    from training.spec import SpecInvalid, parse_row

    try:
        row = parse_row(job.get("hyperparameters", {}), job.get("gpu_config", {}))
    except SpecInvalid as invalid:
        return None, [f"{fault.field}: {fault.message}" for fault in invalid.faults], ()
    return row, [], row.unknown_keys


def _print(
    file: Path, faults: list[str], unknown: tuple[str, ...], verdict: PreflightReport | None, dataset: Path | None
) -> None:
    from rich.text import Text

    from daemon.terminal.console import say, say_done
    from daemon.terminal.sanitize import plain

    for fault in faults:
        say(Text.assemble(("✗ ", "bold red"), plain(fault)))
    if unknown:
        say(Text.assemble(("! ", "yellow"), f"unknown and unused: {plain(', '.join(unknown))}"))
    if not faults and dataset != file:
        say_done(f"{file.name} is a job that can be run")
    if verdict is not None and dataset is not None:
        print_verdict(verdict, dataset)
