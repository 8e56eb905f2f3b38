"""A row of the front becomes a job of the same owner and dataset, and never one on somebody else's file."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.dataset.test_paths import ALLOWED, PATHS
from tests.fronts.pipeline import Pipeline
from tests.postgres import insert_statement


@pytest.mark.parametrize("server", [False, True], ids=["user", "server"])
@pytest.mark.parametrize("status", ["pending", "queued"])
def test_a_row_becomes_a_job_of_the_same_owner_with_what_its_columns_ask_for(
    pipeline: Pipeline, server: bool, status: str
) -> None:
    row_id = pipeline.insert(
        server=server, status=status, learning_rate=2e-4, batch_size=8, epochs=5, rank=8, alpha=16, dropout=0.1,
        gpu_type="NVIDIA A100", gpu_count=2,
    )  # fmt: skip
    row, job = pipeline.row(row_id), pipeline.job(row_id)
    assert (row["status"], row["runpod_job_id"]) == ("queued", str(row_id))
    assert (job["status"], job["user_id"], job["front"], job["due"]) == ("queued", pipeline.user, "pipeline", True)
    assert job["hyperparameters"] == {
        "base_model": "tiny", "learning_rate": 2e-4, "batch_size": 8, "num_epochs": 5, "lora_rank": 8,
        "lora_alpha": 16, "lora_dropout": 0.1,
    }  # fmt: skip
    assert (job["need_gpu_type"], job["need_gpus"], job["base_model"]) == ("NVIDIA A100", 2, "tiny")
    assert (job["total_epochs"], float(job["estimated_total_cost"])) == (5, 2.5)
    dataset = pipeline.database.one("SELECT * FROM datasets WHERE id = %s", (job["dataset_id"],))
    assert (dataset["storage_bucket"], dataset["storage_path"]) == ("training-files", row["dataset_file_path"])
    assert (dataset["user_id"], dataset["name"]) == (pipeline.user, "Conversations")
    assert pipeline.database.story(row_id) == ["queued"]


def test_what_only_the_trainer_writes_begins_at_its_beginning(pipeline: Pipeline) -> None:
    sent = {
        "progress": 90, "current_step": 5, "current_loss": 0.1, "adapter_file_path": "lora-models/x.tar.gz",
        "adapter_status": "active", "actual_cost": 0, "final_loss": 0.1, "error_message": "x", "runpod_job_id": "rp-1",
        "started_at": "2020-01-01", "completed_at": "2020-01-01", "created_at": "2020-01-01",
    }  # fmt: skip
    row_id = pipeline.insert(**sent)
    row = pipeline.row(row_id)
    kept = {name for name, value in sent.items() if str(row[name]).startswith(str(value))}
    assert kept == set() and row["runpod_job_id"] == str(row_id)


def test_the_dataset_row_is_used_when_it_names_the_same_file_and_found_again_for_the_next_job(
    pipeline: Pipeline,
) -> None:
    own = pipeline.database.insert_dataset(pipeline.user)
    path = pipeline.database.one("SELECT storage_path FROM datasets WHERE id = %s", (own,))["storage_path"]
    for named in ({"dataset_id": own, "dataset_file_path": None}, {"dataset_id": own, "dataset_file_path": path},
                  {"dataset_file_path": path}):  # fmt: skip
        assert pipeline.job(pipeline.insert(**named))["dataset_id"] == own
    # The file that the page names counts: it is what the older dispatcher trained on.
    elsewhere = f"{pipeline.user}/another.jsonl"
    first, second = (pipeline.insert(dataset_id=own, dataset_file_path=elsewhere) for _ in range(2))
    assert pipeline.job(first)["dataset_id"] == pipeline.job(second)["dataset_id"] != own


def test_an_exported_file_is_its_creators_and_nobody_elses(pipeline: Pipeline) -> None:
    database, stranger = pipeline.database, pipeline.database.insert_user()
    exported = database.one(
        "INSERT INTO training_files (name, json_file_path, jsonl_file_path, created_by) VALUES ('x', 'x', 'x', %s) "
        "RETURNING id", (pipeline.user,)
    )["id"]  # fmt: skip
    path = f"{exported}/training.jsonl"
    for server in (False, True):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="is not yours"):
            Pipeline(database, stranger).insert(dataset_file_path=path, server=server)
    job = pipeline.job(pipeline.insert(dataset_file_path=path))
    dataset = database.one("SELECT * FROM datasets WHERE id = %s", (job["dataset_id"],))
    assert (dataset["storage_bucket"], dataset["storage_path"], dataset["user_id"]) == (
        "training-files", path, pipeline.user,
    )  # fmt: skip
    for server in (False, True):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="is not yours"):
            Pipeline(database, stranger).insert(dataset_file_path=path, server=server)
    assert database.run("SELECT FROM training_jobs WHERE user_id = %s", (stranger,)) == []
    # Whoever makes such a row chooses its id: it must not open another user's folder.
    database.run(
        "INSERT INTO training_files (id, name, json_file_path, jsonl_file_path, created_by) "
        "VALUES (%s, 'x', 'x', 'x', %s)", (pipeline.user, stranger)
    )  # fmt: skip
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="is not yours"):
        Pipeline(database, stranger).insert(dataset_file_path=f"{pipeline.user}/x.jsonl")


@pytest.mark.parametrize("server", [False, True], ids=["user", "server"])
def test_a_file_is_the_owners_by_the_rule_of_datasets_for_every_role(pipeline: Pipeline, server: bool) -> None:
    """The same cases as for the guard of `datasets` and the download."""
    database, me, other = pipeline.database, pipeline.user, pipeline.database.insert_user()
    makers = {"mine": me, "theirs": other, "nobodys": None, "squatted": me}
    ids = {kind: other if kind == "squatted" else uuid4() for kind in makers}
    for kind, maker in makers.items():
        database.run(
            "INSERT INTO training_files (id, name, json_file_path, jsonl_file_path, created_by) "
            "VALUES (%s, 'x', 'x', 'x', %s)", (ids[kind], maker)
        )  # fmt: skip
    names = {"me": me, "other": other, "unknown": uuid4(), "MINE": str(ids["mine"]).upper()} | ids
    admitted = set()
    for kind in filter(str.strip, PATHS):
        try:
            pipeline.insert(dataset_file_path=kind.format(**names), server=server)
            admitted.add(kind)
        except psycopg.errors.InsufficientPrivilege as refused:
            assert "is not yours" in str(refused) and str(me) in str(refused.diag.message_hint)
    assert admitted == {kind for bucket, kind in ALLOWED if bucket == "training-files"}
    assert database.one("SELECT count(*) AS n FROM training_jobs")["n"] == len(admitted)


def test_what_cannot_become_a_job_is_refused_with_what_to_do(pipeline: Pipeline) -> None:
    database, stranger = pipeline.database, pipeline.database.insert_user()
    theirs = database.insert_dataset(stranger)
    taken = database.insert_job(stranger)
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"dataset_file_path": None}, "a job needs a dataset", "dataset_file_path"),
        ({"dataset_file_path": " "}, "a job needs a dataset", "dataset_file_path"),
        ({"dataset_id": theirs, "dataset_file_path": None}, "not yours", "that you own"),
        ({"dataset_id": theirs}, "not yours", "that you own"),
        ({"user_id": stranger}, "for yourself only", "your own id"),
        ({"user_id": None}, "for yourself only", "your own id"),
        ({"status": "completed", "adapter_file_path": "lora-models/x"}, "not as completed", "leave status out"),
        ({"id": taken}, "is taken", "leave id out"),
    ]  # fmt: skip
    for columns, message, hint in cases:
        with pytest.raises(psycopg.Error, match=message) as refused:
            pipeline.insert(**columns)
        assert hint in str(refused.value.diag.message_hint), columns
    with pytest.raises(psycopg.errors.NotNullViolation, match="needs an owner"):
        pipeline.insert(user_id=None, server=True)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="not yours"):
        pipeline.insert(dataset_id=theirs, server=True)
    with database.acting("anon") as anon, pytest.raises(psycopg.Error):
        text, values = insert_statement("pipeline_training_jobs", pipeline.wish())
        anon.execute(text.encode(), values)
    assert database.run("SELECT FROM pipeline_training_jobs") == []


def test_a_path_that_another_user_has_taken_says_so(pipeline: Pipeline) -> None:
    path = f"{pipeline.user}/x.jsonl"
    pipeline.database.insert_dataset(pipeline.database.insert_user(), storage_path=path)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="dataset of another user"):
        pipeline.insert(dataset_file_path=path)


def test_what_the_server_writes_down_of_elsewhere_is_no_job(pipeline: Pipeline) -> None:
    for columns in ({"status": "completed"}, {"status": "running"}, {"runpod_job_id": "rp-1"}):
        row = pipeline.insert(server=True, **columns)
        assert pipeline.database.run("SELECT FROM training_jobs WHERE id = %s", (row,)) == []
        assert pipeline.row(row)["status"] == columns.get("status", "pending")


@pytest.mark.parametrize("caller", ["user", "server"])
def test_nobody_says_that_a_job_belongs_to_a_row_but_the_front(pipeline: Pipeline, caller: str) -> None:
    """Else a job of one's own, with the id of somebody's row, would write into that row."""
    database = pipeline.database
    victim = Pipeline(database, database.insert_user())
    old = victim.insert(server=True, status="completed")
    dataset = database.insert_dataset(pipeline.user)
    given = {"id": old, "user_id": pipeline.user, "dataset_id": dataset, "front": "pipeline"}
    text, values = insert_statement("training_jobs", given)
    with pipeline.as_server() if caller == "server" else pipeline.as_user() as app:
        app.execute(text.encode(), values)
        app.execute("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (old,))
    if caller == "server":
        with pipeline.as_server() as app:
            app.execute("UPDATE training_jobs SET front = 'pipeline' WHERE id = %s", (old,))
    assert database.job(old)["front"] is None and victim.row(old)["status"] == "completed"


def test_a_job_that_is_inserted_into_training_jobs_is_as_it_was(pipeline: Pipeline) -> None:
    job = pipeline.database.insert_job(pipeline.user)
    assert pipeline.job(job)["front"] is None
    assert pipeline.database.run("SELECT FROM pipeline_training_jobs") == []


def test_a_column_that_the_app_drops_breaks_no_insert_and_no_cancel(pipeline: Pipeline) -> None:
    for column in ("dropout", "tokens_per_second", "error_details", "estimated_cost", "gpu_type"):
        pipeline.database.run(f"ALTER TABLE pipeline_training_jobs DROP COLUMN {column}")
    wish = {name: value for name, value in pipeline.wish().items() if name not in ("dropout", "estimated_cost")}
    text, values = insert_statement("pipeline_training_jobs", wish)
    with pipeline.as_user() as app:
        made = app.execute(text.encode(), values).fetchone()
    assert made is not None and pipeline.job(made["id"])["hyperparameters"].get("lora_dropout") is None
    assert pipeline.cancel(made["id"]) == 1
    assert pipeline.job(made["id"])["status"] == pipeline.row(made["id"])["status"] == "cancelled"


def test_ids_of_rows_and_jobs_are_one(pipeline: Pipeline) -> None:
    wanted = uuid4()
    assert pipeline.insert(id=wanted) == wanted == pipeline.job(wanted)["id"]
    with pytest.raises(psycopg.errors.UniqueViolation):
        pipeline.insert(id=wanted)
