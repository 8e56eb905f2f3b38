"""Where a dataset may lie: one table of cases for the guard of `datasets` and the download, which keep one rule."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.dataset.fetch import fetch_dataset
from daemon.errors import JobFailed
from daemon.queue.job import JobDataset
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.sql_script import split_statements
from daemon.settings import Settings
from daemon.storage.folder import FolderStorage
from daemon.storage.interface import safe_object_path
from tests.paths import ROOT
from tests.postgres import AppDatabase, insert_statement

PIPELINE = ROOT / "tests" / "app_pipeline_schema.sql"
# Paths by what they are; `mine`, `theirs`, `nobodys` are ids of training files. `squatted` is one of mine that has
# another user's id.
OWN = "{me}/d.jsonl"
OWN_FILE = "{mine}/training.jsonl"
PATHS = (
    OWN, OWN_FILE, "{me}/deeper/d.jsonl", "{mine}/2/training file (1).jsonl",
    "{other}/d.jsonl", "{me}-not/d.jsonl", "{me}", "{me}/", "{me}//d.jsonl", "/{me}/d.jsonl", "{me}/../{other}/d.jsonl",
    "{me}/./d.jsonl", "./{me}/d.jsonl", "{me}/d#.jsonl", "{me}/%2e%2e/d.jsonl", "{me}/ü.jsonl", "{me}/d.jsonl\n", "..",
    "", "{theirs}/training.jsonl", "{nobodys}/training.jsonl", "{squatted}/d.jsonl", "{unknown}/training.jsonl",
    "{mine}", "{mine}/", "{mine}//training.jsonl", "/{mine}/training.jsonl", "{mine}/../{theirs}/training.jsonl",
    "{MINE}/training.jsonl", "{mine}x/training.jsonl", "files/{mine}/training.jsonl", "files/x.json",
    "urls/x", "https://example.org/d.jsonl",
)  # fmt: skip
BUCKETS = ("lora-datasets", "training-files", "lora-models", "Lora-Datasets", "../secrets", "url", "", None)
ALLOWED = {
    *((bucket, path) for bucket in ("lora-datasets", "training-files") for path in (OWN, "{me}/deeper/d.jsonl")),
    *(("training-files", path) for path in (OWN_FILE, "{mine}/2/training file (1).jsonl")),
}
# The row that the guard of jobs makes for a dataset_url: there is no such bucket, and nothing is read from it.
OF_A_URL = {("url", "urls/x")}
# How the app has declared the owner of a training file.
EDITIONS = {
    "as it is": (),
    "text": (
        "ALTER TABLE training_files DROP CONSTRAINT training_files_created_by_fkey",
        'DROP POLICY "Users can create training files" ON training_files',
        'DROP POLICY "Users can update own training files" ON training_files',
        "ALTER TABLE training_files ALTER created_by TYPE text",
    ),
}
WITHOUT = {
    "no such table": ("DROP TABLE training_files",),
    "no owner": ("ALTER TABLE training_files DROP COLUMN created_by CASCADE",),
}


@dataclass(frozen=True)
class App:
    """A database with the app's newer module, two users, and a training file of each kind."""

    database: AppDatabase
    me: UUID
    other: UUID
    names: dict[str, str]

    def path(self, of_kind: str) -> str:
        return of_kind.format(**self.names)

    def declare(self, statements: tuple[str, ...]) -> None:
        for statement in statements:
            self.database.run(statement)


@pytest.fixture
def app(database: AppDatabase) -> App:
    """Its table comes after ours, and its rows are made as its users make them."""
    for statement in split_statements(PIPELINE.read_text()):
        database.run(statement)
    database.run("GRANT ALL ON training_files TO authenticated, service_role")  # as an older project grants everything
    me, other = database.insert_user(), database.insert_user()
    ids = {"mine": uuid4(), "theirs": uuid4(), "nobodys": uuid4(), "squatted": other}
    makers = {"mine": me, "theirs": other, "squatted": me}
    for kind, file_id in ids.items():
        row = {
            "id": file_id, "name": kind, "json_file_path": f"{file_id}/training.json",
            "jsonl_file_path": f"{file_id}/training.jsonl", "created_by": makers.get(kind),
        }  # fmt: skip
        text, values = insert_statement("training_files", row)
        role = "authenticated" if kind in makers else "service_role"
        with database.acting(role, makers.get(kind)) as caller:
            caller.execute(text.encode(), values)
    names = {"me": str(me), "other": str(other), "unknown": str(uuid4()), "MINE": str(ids["mine"]).upper()}
    return App(database, me, other, names | {kind: str(file_id) for kind, file_id in ids.items()})


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


def guard_admits(app: App, role: str, verb: str) -> set[tuple[str | None, str]]:
    """The cases in which this role may insert such a row, or change its own row to it. Nothing is kept."""
    admitted = set()
    with app.database.acting(role, app.me) as caller:
        own = app.database.insert_dataset(app.me)
        for bucket, kind in ((bucket, kind) for bucket in BUCKETS for kind in PATHS):
            given: dict[str, Any] = {"storage_bucket": bucket, "storage_path": app.path(kind)}
            if verb == "insert":
                row = given | {"user_id": app.me, "name": "x", "file_name": "x", "file_size": 1}
                text, values = insert_statement("datasets", row)
            else:
                text = "UPDATE datasets SET storage_bucket = %(storage_bucket)s, storage_path = %(storage_path)s "
                text, values = text + "WHERE id = %(id)s RETURNING id", given | {"id": own}
            caller.execute("SAVEPOINT try")
            try:
                if caller.execute(text.encode(), values).fetchall():
                    admitted.add((bucket, kind))
            except psycopg.errors.InsufficientPrivilege as error:
                assert role == "anon" or error.diag.message_hint, "a refusal says what to do"
            caller.execute("ROLLBACK TO SAVEPOINT try")
    return admitted


async def downloads(app: App, store: SqlJobStore, folder: Path) -> set[tuple[str | None, str]]:
    """The cases in which the daemon opens what the owner's row names: there is such a file for each plain path."""
    opened = set()
    settings = Settings(_env_file=None, database_url="postgresql://unused")
    for bucket, kind in ((bucket, kind) for bucket in BUCKETS for kind in PATHS):
        path = app.path(kind)
        file = folder / "storage" / (bucket or "none") / path.strip("/")
        if path and ".." not in f"{bucket}/{path}" and not file.is_dir() and file.parent.suffix != ".jsonl":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}\n")
        dataset = JobDataset(uuid4(), app.me, uuid4(), None, bucket, path, app.me)
        to = folder / "fetched"
        try:
            await fetch_dataset(
                dataset, settings, FolderStorage(folder / "storage"), to, owns_file=store.owns_training_file
            )
            opened.add((bucket, kind))
        except JobFailed as refused:
            assert refused.hint
        to.unlink(missing_ok=True)
    return opened


def test_what_a_path_may_be_is_one_rule_in_the_database_and_in_the_daemon(database: AppDatabase) -> None:
    """Every character up to 0x250, at each place of a name; segments of dots; lengths around the limit."""
    characters = [chr(code) for code in range(1, 0x250)] + ["\u2028", "\uff0f", "\U0001f600"]
    paths = [form.format(character) for character in characters for form in ("{}", "a{}", "{}a", "a/{}/b", "a{}b")]
    segments = ("", ".", "..", "...", "a", ".a", "a.", " ", "a b")
    paths += ["/".join(parts) for count in (1, 2, 3) for parts in itertools.product(segments, repeat=count)]
    paths += ["a" * length for length in (899, 900, 901)] + ["a/" * 449 + "aa", "a/" * 450 + "a"]

    def is_safe(path: str) -> bool:
        try:
            return safe_object_path(path) == path
        except JobFailed:
            return False

    asked = database.run("SELECT path, training_is_object_path(path) AS safe FROM unnest(%s::text[]) AS path", (paths,))
    answers = {row["path"]: row["safe"] for row in asked}
    assert {path for path in paths if is_safe(path)} == {path for path, safe in answers.items() if safe}
    assert set(answers) == set(paths)


def test_the_rule_is_written_nowhere_else() -> None:
    """A migration that has shipped keeps its text; what counts is the one that comes last."""
    files = [*(ROOT / "sql").rglob("*.sql"), *(ROOT / "daemon").rglob("*.py")]
    homes = {file.relative_to(ROOT).as_posix() for file in files if "A-Za-z0-9!_.*" in file.read_text()}
    shipped = {"sql/migrations/20261128000003_app_as_it_is.sql"}
    assert homes - shipped == {"sql/migrations/20261128000027_object_path.sql", "daemon/storage/interface.py"}


@pytest.mark.parametrize("edition", EDITIONS)
async def test_the_guard_and_the_download_keep_one_rule(
    app: App, store: SqlJobStore, tmp_path: Path, edition: str
) -> None:
    app.declare(EDITIONS[edition])
    assert guard_admits(app, "authenticated", "insert") == ALLOWED | OF_A_URL
    assert guard_admits(app, "authenticated", "update") == ALLOWED | OF_A_URL
    assert await downloads(app, store, tmp_path) == ALLOWED


async def test_trusted_roles_may_write_any_row_and_the_download_still_keeps_the_rule(
    app: App, store: SqlJobStore, tmp_path: Path
) -> None:
    everything = {(bucket, kind) for bucket in BUCKETS for kind in PATHS}
    assert guard_admits(app, "service_role", "insert") == everything
    assert guard_admits(app, "training_daemon", "insert") == everything
    assert guard_admits(app, "anon", "insert") == set()
    assert await downloads(app, store, tmp_path) == ALLOWED


@pytest.mark.parametrize("edition", WITHOUT)
async def test_where_nobody_owns_training_files_only_the_own_prefix_counts(
    app: App, store: SqlJobStore, tmp_path: Path, edition: str
) -> None:
    app.declare(WITHOUT[edition])
    own = {case for case in ALLOWED if case[1].startswith("{me}")}
    assert guard_admits(app, "authenticated", "insert") == own | OF_A_URL
    assert await downloads(app, store, tmp_path) == own


def test_nobody_learns_whose_a_training_file_is(app: App) -> None:
    asked = "SELECT training_owns_file(%s, %s) AS own"
    with app.database.acting("authenticated", app.me) as caller:
        row = caller.execute(asked, (app.other, app.path("{theirs}/training.jsonl"))).fetchone()
    assert row == {"own": False}
    with pytest.raises(psycopg.errors.InsufficientPrivilege), app.database.acting("anon") as caller:
        caller.execute(asked, (app.me, app.path(OWN_FILE)))
