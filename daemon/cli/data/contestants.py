"""The adapters of a comparison: completed jobs or adapter folders of one base model, with the data they held out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from daemon.cli.errors import CommandFailed, Misused

if TYPE_CHECKING:
    from daemon.cli.data.connection import Connection
    from daemon.settings import Settings

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One adapter to compare: its folder on this disk, and what is known of its training."""

    name: str
    folder: Path
    base_model: str | None
    base_revision: str | None = None
    job_id: UUID | None = None
    user_id: UUID | None = None
    adapter_sha256: str | None = None
    hyperparameters: dict[str, Any] | None = None
    spec_sha256: str | None = None
    trained_on: date | None = None

    @property
    def about(self) -> str:
        chosen = self.hyperparameters or {}
        said = {"rank": "lora_rank", "epochs": "num_epochs", "learning rate": "learning_rate"}
        return ", ".join(f"{word} {chosen[key]:g}" for word, key in said.items() if key in chosen)


def entry_of_folder(folder: Path) -> Entry:
    """Reads an adapter's folder. Raises CommandFailed if it holds none."""
    config = _read_json(folder / "adapter_config.json")
    if config is None:
        raise CommandFailed(f"the folder {folder} holds no adapter: there is no adapter_config.json in it")
    manifest = _read_json(folder / MANIFEST) or {}
    trained_with = manifest.get("trained_with")
    chosen = trained_with.get("hyperparameters") if isinstance(trained_with, dict) else None
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return Entry(
        name=folder.resolve().name,
        folder=folder,
        base_model=name if isinstance(name, str) and name else None,
        base_revision=revision if isinstance(revision, str) else None,
        hyperparameters=chosen if isinstance(chosen, dict) else manifest.get("hyperparameters"),
        spec_sha256=manifest.get("spec_sha256"),
    )


def entry_of_job(connection: Connection, wanted: str) -> Entry:
    """Finds a completed job and fetches its adapter, once for all commands. Raises Misused or CommandFailed."""
    from dataclasses import replace

    from daemon.cli.commands.adapters import completed_job, kept_adapter
    from daemon.cli.data.queries import find_job
    from daemon.terminal.format import short_id

    row, details = completed_job(connection, find_job(connection, wanted))
    entry = entry_of_folder(kept_adapter(row, details))
    trained_with = (details.trained_with or {}).get("hyperparameters")
    return replace(
        entry,
        name=short_id(row.job_id),
        base_model=entry.base_model or row.model,
        job_id=row.job_id,
        user_id=row.user_id,
        adapter_sha256=details.adapter_sha256,
        hyperparameters=trained_with if isinstance(trained_with, dict) else entry.hyperparameters,
        trained_on=row.started_at.astimezone(UTC).date() if row.started_at else None,
    )


def one_base(entries: Sequence[Entry]) -> str | None:
    """Returns the name of the base model that all belong to; None if no adapter names it. Raises Misused."""
    named = {entry.base_model: entry.name for entry in reversed(entries) if entry.base_model is not None}
    if len(named) > 1:
        listed = ", ".join(f"{name} belongs to {base}" for base, name in named.items())
        raise Misused(f"these adapters are of different base models: {listed}", "compare adapters of one base model")
    return next(iter(named), None)


def fetch_data(
    connection: Connection, entries: Sequence[Entry], settings: Settings, into: Path
) -> tuple[dict[int, Path], list[str]]:
    """Fetches the datasets of the jobs among `entries` with their owners' rights: by place, and what was not there."""
    from daemon.dataset.fetch import fetch_dataset
    from daemon.errors import JobError
    from daemon.sentence import as_sentence
    from daemon.storage.open import open_storage

    found: dict[int, Path] = {}
    notes: list[str] = []
    of_dataset: dict[Any, tuple[Path, str]] = {}

    async def owns_file(user_id: UUID, path: str) -> bool:
        from daemon.database.statements import statement

        row = connection.execute(
            statement("find_training_file").encode(), {"user_id": user_id, "path": path}
        ).fetchone()
        return bool(row and row["is_own"])

    async def fetch_all() -> None:
        storage = open_storage(settings)
        try:
            for place, entry in enumerate(entries):
                if entry.job_id is None:
                    continue
                dataset = _dataset_of(connection, entry.job_id)
                key = (dataset.user_id, dataset.dataset_id, dataset.dataset_url)
                try:
                    if key not in of_dataset:
                        to = into / f"{len(of_dataset)}.data"
                        fetched = await fetch_dataset(dataset, settings, storage, to, owns_file=owns_file)
                        of_dataset[key] = fetched.path, fetched.sha256
                except JobError as error:
                    notes.append(as_sentence(f"the held-out data of {entry.name} are not known: {error.message}"))
                    continue
                found[place], sha256 = of_dataset[key]
                if _has_changed(connection, entry, sha256):
                    notes.append(
                        f"The dataset of {entry.name} is not the one that it was trained on: it has changed since. "
                        "What counts as held out here may have been trained on."
                    )
        finally:
            await storage.close()

    asyncio.run(fetch_all())
    return found, notes


def _dataset_of(connection: Connection, job_id: UUID) -> Any:
    from daemon.database.statements import read_statement
    from daemon.queue.job import JobDataset

    row = connection.execute(read_statement("read_trained_data"), {"job_id": job_id}).fetchone()
    if row is None:
        raise Misused(f"there is no job {job_id}")
    return JobDataset(**{name: row[name] for name in JobDataset.__dataclass_fields__})


def _has_changed(connection: Connection, entry: Entry, dataset_sha256: str) -> bool:
    """Compares with the hash of what the adapter was made from; False where that is not known."""
    from daemon.attempt.finished_adapter import spec_hash
    from daemon.database.statements import read_statement
    from training.spec import SpecInvalid, parse_row

    if entry.spec_sha256 is None or entry.base_model is None:
        return False
    row = connection.execute(read_statement("read_trained_data"), {"job_id": entry.job_id}).fetchone()
    assert row is not None
    try:
        asked = parse_row(row["hyperparameters"], {}).hyperparameters
    except SpecInvalid:
        return False
    return spec_hash(asked.base_model or entry.base_model, asked, dataset_sha256) != entry.spec_sha256


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
