"""Downloads and verifies the adapter of a completed job, or an export of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from daemon.cli.commands.jobs import AsJson, JobId

if TYPE_CHECKING:
    from uuid import UUID

    from daemon.cli.data.connection import Connection
    from daemon.cli.data.queries import JobDetails
    from daemon.job_view.reads import JobRow
    from daemon.settings import Settings


def download(
    job: JobId,
    to: Annotated[Path | None, typer.Option("--to", help="A new folder; default: ./adapter-ID, or ./KIND-ID.")] = None,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="KIND", help="An export of it instead: merged, gguf or transformers4."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a completed job's adapter, compare its hash with the row and unpack it."""
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import find_job
    from daemon.terminal.console import console, print_json, say, say_done
    from daemon.terminal.format import short_id, size

    with open_database() as connection:
        job_id = find_job(connection, job)
        row, details = completed_job(connection, job_id)
        result = None if export is None else _stored_export(connection, job_id, export)
    if result is not None:
        _download_export(job_id, result, to or Path(f"{export}-{short_id(job_id)}"), as_json)
        return
    folder = to or Path(f"adapter-{short_id(job_id)}")
    with console(stderr=True).status(f"fetching {size(details.adapter_bytes)} …"):
        manifest = fetch_adapter(row, details, folder)
    if as_json:
        print_json({"job_id": job_id, "path": folder.resolve(), "sha256": details.adapter_sha256, "manifest": manifest})
        return
    say_done(f"{folder} ({size(details.adapter_bytes)}, sha256 as in the row) for {_base_of(manifest, row)}")
    say(f"  talk to it:  brightrun-trainer chat {folder}")


def redeliver(
    job: JobId,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="merged, gguf, transformers4, hub or endpoint.")],
    target: Annotated[str | None, typer.Option(help="Which one, where the job has several of the kind.")] = None,
    as_json: AsJson = False,
) -> None:
    """Do again what follows a completed job, or make an export that it did not ask for. A host does it."""
    from daemon.cli.data.connection import open_database, said_plainly
    from daemon.cli.data.queries import find_job
    from daemon.cli.errors import Misused
    from daemon.delivery.delivery import EXPORTS
    from daemon.queue.outcome import DeliveryKind
    from daemon.terminal.console import print_json, say_done

    if kind not in get_args(DeliveryKind):
        raise Misused(f"{kind[:80]!r} is no delivery", f"choose one of {', '.join(get_args(DeliveryKind))}")
    if target is not None and kind in EXPORTS:
        raise Misused(f"the export {kind} has no target", "leave out --target: it is for hub and endpoint")
    with open_database() as connection:
        job_id = find_job(connection, job)
        with said_plainly():
            row = connection.execute("SELECT public.redeliver(%s, %s, %s) AS answer", (job_id, kind, target)).fetchone()
    if as_json and row is not None:
        print_json(row["answer"])
    elif not as_json:
        say_done(f"{kind} of {job_id} waits for a host; `brightrun-trainer show {job_id}` says how it stands")


def _stored_export(connection: Connection, job_id: UUID, kind: str) -> dict[str, Any]:
    """Reads where an export is. Raises CommandFailed if it is not stored (yet)."""
    from daemon.cli.errors import CommandFailed, Misused
    from daemon.database.statements import read_statement
    from daemon.delivery.delivery import EXPORTS
    from daemon.terminal.format import short_id

    if kind not in EXPORTS:
        raise Misused(f"{kind[:80]!r} is no export", f"choose one of {', '.join(EXPORTS)}")
    row = connection.execute(read_statement("read_delivery"), {"job_id": job_id, "kind": kind}).fetchone()
    again = f"`brightrun-trainer redeliver {short_id(job_id)} {kind}` asks for it"
    if row is None:
        raise CommandFailed(f"job {job_id} has no export {kind}", again)
    result: dict[str, Any] | None = row["result"]
    if result is None:
        words = {"failed": f"failed: {row['error_message']}", "running": "is made now"}.get(
            row["state"], "waits for a host"
        )
        raise CommandFailed(f"the export {kind} of job {job_id} {words}", again if row["state"] == "failed" else None)
    return result


def _download_export(job_id: UUID, result: dict[str, Any], folder: Path, as_json: bool) -> None:
    import asyncio

    from daemon.cli.errors import Misused
    from daemon.delivery.fetch_export import fetch_export
    from daemon.read_settings import load_settings
    from daemon.storage.open import open_storage
    from daemon.terminal.console import print_json, say_done
    from daemon.terminal.format import size
    from daemon.terminal.progress_bar import transfer_bar

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Misused(f"the folder {folder} exists already and is not empty", "name a new folder with --to")
    settings = load_settings().model_copy(update={"models_bucket": str(result["path"]).partition("/")[0]})

    async def fetch() -> dict[str, Any]:
        storage = open_storage(settings)
        try:
            with transfer_bar(folder.name, shown=not as_json, verb="fetching") as on_bytes:
                return await fetch_export(storage, result, folder, on_bytes)
        finally:
            await storage.close()

    manifest = asyncio.run(fetch())
    if as_json:
        print_json({"job_id": job_id, "path": folder.resolve(), "bytes": result["bytes"], "manifest": manifest})
        return
    say_done(f"{folder} ({size(result['bytes'])}, each file as in the manifest)")


def fetch_adapter(row: JobRow, details: JobDetails, folder: Path) -> dict[str, Any]:
    """Downloads, verifies and unpacks into a new folder; returns the manifest. A failure leaves no files.

    Raises CommandFailed if the hash differs or the folder is not empty, JobError from the storage."""
    import asyncio
    import tempfile

    from daemon.cli.errors import CommandFailed, Misused
    from daemon.read_settings import load_settings
    from daemon.storage.archive import ArchiveInvalid, unpack_adapter

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Misused(f"the folder {folder} exists already and is not empty", "name a new folder with --to")
    settings = load_settings()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: on the same disk, and the user can see what is left if we are killed.
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder.parent) as scratch:
            archive = Path(scratch) / "adapter.tar.gz"
            sha256 = asyncio.run(_fetch(settings, str(row.adapter_path), archive))
            if sha256 != details.adapter_sha256:
                raise CommandFailed(
                    f"the stored adapter is not the one of this job: sha256 {sha256[:12]}…, "
                    f"the row says {(details.adapter_sha256 or 'nothing')[:12]}…",
                    "do not use it: the object in storage was changed",
                )
            return unpack_adapter(archive, folder)
    except ArchiveInvalid as error:
        raise CommandFailed(f"the stored adapter cannot be unpacked: {error}") from error
    except OSError as error:
        raise CommandFailed(f"the folder {folder} cannot be written: {error.strerror or error}") from error


def kept_adapter(row: JobRow, details: JobDetails) -> Path:
    """The folder of a completed job's adapter, downloaded once and kept in the cache."""
    from daemon.demo.model import cache_folder

    kept = cache_folder() / "adapters" / f"{row.job_id}-{(details.adapter_sha256 or '')[:12]}"
    if not (kept / "adapter_config.json").is_file():
        fetch_adapter(row, details, kept)
    return kept


async def _fetch(settings: Settings, adapter_path: str, archive: Path) -> str:
    """Downloads bucket/path into a file; returns its sha256."""
    from daemon.storage.open import open_storage

    bucket, _, path = adapter_path.partition("/")
    storage = open_storage(settings.model_copy(update={"models_bucket": bucket}))
    try:
        return (await storage.download(path, archive)).sha256
    finally:
        await storage.close()


def completed_job(connection: Connection, job_id: UUID) -> tuple[JobRow, JobDetails]:
    """Reads a job that has an adapter. Raises CommandFailed if it has none."""
    from daemon.cli.data.queries import read_details, read_job
    from daemon.cli.errors import CommandFailed

    row = read_job(connection, job_id)
    if row.state != "completed" or row.adapter_path is None:
        way = f"`brightrun-trainer watch {job_id}` waits for it" if not row.is_final else None
        raise CommandFailed(f"job {job_id} is {row.state} and has no adapter", way)
    return row, read_details(connection, job_id)


def _base_of(manifest: dict[str, Any], row: JobRow) -> str:
    from daemon.terminal.sanitize import plain

    return plain(manifest.get("base_model") or row.model or "its base model")
