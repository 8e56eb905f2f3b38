"""Submits a job from a dataset file: checks, estimates, uploads, inserts, and watches it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID, uuid4

import typer

if TYPE_CHECKING:
    from daemon.cli.data.connection import Connection
    from daemon.cli.data.preflight import Forecast, PreflightReport
    from daemon.settings import Settings
    from training.spec import ParsedRow


@dataclass(frozen=True)
class _Wish:
    """A job to be inserted: its two JSON columns, and the other columns."""

    hyperparameters: dict[str, Any]
    gpu_config: dict[str, Any]
    columns: dict[str, Any]


def submit(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Conversations: JSONL, or one JSON document.")],
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base model: its name on the hub.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", "-e", help="Passes over the data.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Width of the adapter.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b", help="Conversations per step.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other hyperparameter, such as max_length=2048."),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Only this kind of GPU, such as H100.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Number of GPUs.")] = None,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", help="Minimum memory per GPU, in GB.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", help="The owner's id or e-mail; default: TRAINER_SERVICE_USER_ID.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The dataset's name; default: the file's name.")] = None,
    callback_url: Annotated[str | None, typer.Option("--callback-url", help="URL that receives every change.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="Higher goes first.")] = 0,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", help="Stop the job at this cost in US dollars.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and estimate only; upload and insert nothing.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch the job until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train on a dataset: check the file, estimate time and cost, upload it, queue the job."""
    from daemon.cli.commands.check import judge, print_verdict
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.preflight import forecast, refuse_unless_ok
    from daemon.cli.errors import Misused
    from daemon.read_settings import load_settings
    from daemon.terminal.console import print_json, say, say_done

    wish = _Wish(
        hyperparameters=_without_none(
            base_model=model, num_epochs=epochs, learning_rate=lr, lora_rank=rank, batch_size=batch_size
        )
        | _settings_given(more),
        gpu_config=_without_none(gpu_type=gpu, num_gpus=gpus, gpu_memory_gb=gpu_memory),
        columns=_without_none(callback_url=callback_url, priority=priority or None, max_cost=max_cost),
    )
    row = _parsed(wish)
    if not dataset.is_file():
        raise Misused(f"there is no file {dataset}")
    settings = load_settings()
    with open_database() as connection:
        owner = _owner(connection, user, settings)
        verdict = judge(dataset, row)
        refuse_unless_ok(verdict, dataset)
        ahead = forecast(connection, row.hyperparameters.base_model, verdict, row.hyperparameters.num_epochs)
        if not as_json:
            print_verdict(verdict, dataset)
            say("  " + _forecast_words(ahead))
        if dry_run:
            if as_json:
                print_json({"dataset": verdict, "forecast": ahead})
            return
        job_id = _queue(connection, settings, wish, owner, dataset, name or dataset.name, verdict)
    if as_json:
        print_json({"job_id": job_id, "dataset": verdict, "forecast": ahead})
    else:
        say_done(f"job {job_id} is queued" + ("" if watch else f";  brightrun-trainer watch {str(job_id)[:8]}"))
    if watch:
        from daemon.cli.commands.watch import watch_jobs

        raise typer.Exit(watch_jobs([job_id], as_json=as_json))


def _queue(  # noqa: PLR0917 - who, what and where, in the order of the story
    connection: Connection,
    settings: Settings,
    wish: _Wish,
    owner: UUID,
    dataset: Path,
    name: str,
    verdict: PreflightReport,
) -> UUID:
    """Uploads, then inserts both rows in one transaction. If the insert is refused, deletes the upload."""
    import asyncio

    from daemon.cli.data.connection import said_plainly
    from daemon.errors import TrainerError

    dataset_id = uuid4()
    bucket = settings.dataset_buckets[0]
    path = f"{owner}/{dataset_id}/{_plain_name(dataset)}"
    storage = settings.model_copy(update={"models_bucket": bucket})
    row = {
        "id": dataset_id,
        "user_id": owner,
        "name": name[:200],
        "bucket": bucket,
        "path": path,
        "file_name": dataset.name[:500],
        "file_size": dataset.stat().st_size,
        "answers": verdict.answers,
    }
    job = {
        "user_id": str(owner),
        "dataset_id": str(dataset_id),
        "hyperparameters": wish.hyperparameters,
        "gpu_config": wish.gpu_config,
        **wish.columns,
    }
    asyncio.run(_upload(storage, dataset, path))
    try:
        with said_plainly():
            return _insert(connection, row, job)
    except TrainerError:
        asyncio.run(_withdraw(storage, path))
        raise


def _insert(connection: Connection, dataset: dict[str, Any], job: dict[str, Any]) -> UUID:
    """Inserts both rows or none. Raises Misused if the owner is not a user."""
    from psycopg.errors import ForeignKeyViolation

    from daemon.cli.errors import Misused
    from daemon.database.statements import statement

    try:
        with connection.transaction():
            connection.execute(statement("insert_dataset").encode(), dataset)
            row = connection.execute(
                "SELECT public.submit_training_job(%(job)s::jsonb) AS answer", {"job": json.dumps(job)}
            ).fetchone()
    except ForeignKeyViolation as error:
        raise Misused(f"no user has the id {dataset['user_id']}", "name an existing user with --user") from error
    assert row is not None, "a function gives a row"
    return UUID(row["answer"]["job_id"])


async def _upload(settings: Settings, file: Path, path: str) -> None:
    import asyncio
    import tempfile

    from daemon.storage.open import open_storage
    from daemon.terminal.console import console
    from daemon.terminal.format import size
    from training.files.durable_files import sha256_of

    storage = open_storage(settings)
    try:
        with (
            console(stderr=True).status(f"uploading {size(file.stat().st_size)} …"),
            tempfile.TemporaryDirectory(prefix="brightrun-upload-") as scratch,
        ):
            sha256 = await asyncio.to_thread(sha256_of, file)
            await storage.upload(file, path, sha256=sha256, resume_dir=Path(scratch))
    finally:
        await storage.close()


async def _withdraw(settings: Settings, path: str) -> None:
    from daemon.storage.open import open_storage

    storage = open_storage(settings)
    try:
        await storage.delete(path)
    finally:
        await storage.close()


def _parsed(wish: _Wish) -> ParsedRow:
    """Parses both columns as the daemon will. Raises Misused with every fault."""
    from daemon.cli.errors import Misused
    from training.spec import SpecInvalid, parse_row

    try:
        row = parse_row(wish.hyperparameters, wish.gpu_config)
    except SpecInvalid as invalid:
        listed = "; ".join(f"{_without_column(fault.field)}: {fault.message}" for fault in invalid.faults)
        raise Misused(f"the job cannot be run as it is asked for: {listed}") from None
    if row.unknown_keys:
        unknown = ", ".join(map(_without_column, row.unknown_keys))
        raise Misused(f"these settings are unknown: {unknown}", "see docs/reference/hyperparameters.md")
    return row


def _without_column(field: str) -> str:
    """`exports.0` of `hyperparameters.exports.0`."""
    return field.partition(".")[2] or field


def _owner(connection: Connection, user: str | None, settings: Settings) -> UUID:
    from daemon.cli.data.users import find_owner
    from daemon.cli.errors import Misused

    if user is not None:
        return find_owner(connection, user)
    if settings.service_user_id is not None:
        return settings.service_user_id
    raise Misused("the job has no owner", "give --user (id or e-mail of a user), or set TRAINER_SERVICE_USER_ID")


def _settings_given(given: list[str] | None) -> dict[str, Any]:
    """Parses `--set key=value`: the value as JSON if it is JSON, else as text."""
    from daemon.cli.errors import Misused

    values: dict[str, Any] = {}
    for pair in given or ():
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise Misused(f"--set {pair!r} is not KEY=VALUE")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def _without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _forecast_words(ahead: Forecast) -> str:
    from daemon.terminal.format import money, span

    if ahead.seconds is None:
        return f"time and cost are not known: {ahead.by}"
    cost = f", {money(ahead.dollars)}" if ahead.dollars is not None else ""
    return f"about {span(ahead.seconds)}{cost} once it runs ({ahead.by})"


def _plain_name(file: Path) -> str:
    """The file's name in a form that the storage accepts: ASCII, no '#'."""
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in file.name
    )
