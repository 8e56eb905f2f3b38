"""The how-to page is followed from its first line to its last: the shipped front, and one for a table of one's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.queue.outcome import Completed
from daemon.queue.sql_job_store import SqlJobStore
from tests.docs.blocks import Block, blocks
from tests.docs.test_commands import shell
from tests.fronts.pipeline import Pipeline
from tests.paths import ROOT
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed

PAGE = "docs/how-to/fronts.md"
DONE = Completed("lora-models/adapters/one.tar.gz", "0" * 64, 1_000)


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


def found(language: str, words: str = "") -> list[Block]:
    return [one for one in blocks() if one.page == PAGE and one.language == language and words in one.text]


def run(database: AppDatabase, block: Block) -> list[dict[str, Any]]:
    with database.connect() as admin:
        cursor = admin.execute(block.text.encode())
        return cursor.fetchall() if cursor.description is not None else []


def test_the_commands_install_the_front_and_name_its_model(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "sql").symlink_to(ROOT / "sql")
    (tmp_path / "supabase" / "migrations").mkdir(parents=True)
    shell(tmp_path, "\n".join(block.text for block in found("sh")), 120, DATABASE_URL=pipeline.database.dsn)
    (copy,) = (tmp_path / "supabase" / "migrations").iterdir()
    assert copy.read_bytes() == (ROOT / "sql" / "fronts" / "pipeline.sql").read_bytes()
    assert copy.name[:14].isdigit() and copy.name[14:] == "_front_pipeline.sql"
    assert pipeline.job(pipeline.insert())["base_model"] == "Qwen/Qwen3-8B"


def test_the_statements_about_the_shipped_front_say_what_they_promise(pipeline: Pipeline) -> None:
    database = pipeline.database
    database.run("ALTER TABLE pipeline_training_jobs DISABLE TRIGGER USER")
    old = pipeline.insert()
    database.run("ALTER TABLE pipeline_training_jobs ENABLE TRIGGER USER")
    (waiting,) = found("sql", "WHERE status IN ('pending', 'queued')")
    assert [row["id"] for row in run(database, waiting)] == [old]
    assert run(database, *found("sql", "SELECT release_pipeline_jobs()")) == [{"release_pipeline_jobs": 1}]
    assert run(database, waiting) == [] and pipeline.job(old)["status"] == "queued"
    assert run(database, *found("sql", "SELECT sync_pipeline_jobs()")) == [{"sync_pipeline_jobs": 0}]
    run(database, *found("sql", "DROP FUNCTION"))
    later = pipeline.insert()
    assert pipeline.row(later)["status"] == "pending" and pipeline.cancel(old) == 1
    assert pipeline.job(old)["status"] == "queued", "nothing of the front is left"


async def test_a_table_of_ones_own_becomes_a_front(pipeline: Pipeline, store: SqlJobStore) -> None:
    database, user = pipeline.database, pipeline.user
    run(database, *found("sql", "CREATE TABLE tuning_requests"))
    run(database, *found("sql", "CREATE FUNCTION tuning_requests_insert"))
    database.run("GRANT SELECT, INSERT, UPDATE ON tuning_requests TO authenticated")
    dataset = database.insert_dataset(user)

    def insert(**columns: object) -> UUID:
        given = {"owner": user, "dataset_id": dataset, "model": "tiny"} | columns
        with pipeline.as_user() as app:
            names, marks = ", ".join(given), ", ".join(["%s"] * len(given))
            text = f"INSERT INTO tuning_requests ({names}) VALUES ({marks}) RETURNING id"
            row = app.execute(text.encode(), list(given.values())).fetchone()
        assert row is not None
        made: UUID = row["id"]
        return made

    def request(row_id: UUID) -> dict[str, Any]:
        return database.one("SELECT * FROM tuning_requests WHERE id = %s", (row_id,))

    first = insert(state="completed", adapter="of-somebody-else", passes=5)
    job = database.job(first)
    assert (job["status"], job["base_model"], job["hyperparameters"]["num_epochs"]) == ("queued", "tiny", 5)
    lease = (await claimed(store)).lease
    assert request(first)["state"] == "initializing" and request(first)["adapter"] is None
    await store.start_job(lease)
    with pipeline.as_user() as app:
        app.execute("UPDATE tuning_requests SET state = 'completed', adapter = 'of-somebody-else', percent = 7")
    assert (request(first)["state"], request(first)["adapter"]) == ("running", None)
    await store.complete_job(lease, DONE, cost=None)
    row = request(first)
    assert (row["state"], row["percent"], row["adapter"]) == ("completed", 100, "lora-models/adapters/one.tar.gz")

    second, third = insert(), insert()
    await claimed(store)
    with pipeline.as_user() as app:
        app.execute("UPDATE tuning_requests SET state = 'cancelled' WHERE id = %s", (second,))
    assert request(second)["state"] == database.job(second)["status"] == "cancelled"
    database.run("DELETE FROM tuning_requests WHERE id = %s", (third,))
    assert database.run("SELECT FROM training_jobs WHERE id = %s", (third,)) == []
    with pytest.raises(psycopg.Error, match="not yours"):
        insert(dataset_id=database.insert_dataset(database.insert_user()))
    database.run("ALTER TABLE tuning_requests ADD CONSTRAINT no CHECK (state = 'queued') NOT VALID")
    fourth = insert()
    await store.start_job((await claimed(store)).lease)
    assert (database.job(fourth)["status"], request(fourth)["state"]) == ("running", "queued")
