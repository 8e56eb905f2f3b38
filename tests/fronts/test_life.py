"""The life of ten jobs that the app's pages insert, with real daemons: every ending, and what the pages read of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.daemon_process import eventually
from tests.fronts.pipeline import Pipeline
from tests.lifecycle.queue import Queue

LONG = [["steps", 2000, 0.02]]
FINAL = ("completed", "failed", "cancelled")
# The row's history, and the database webhook that starts the app's deployment.
WATCH = """
CREATE TABLE history (n serial, row_id uuid, status text, progress integer);
CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO public.history (row_id, status, progress) VALUES (NEW.id, NEW.status, NEW.progress);
    RETURN NULL;
END $$;
CREATE TRIGGER remember AFTER INSERT OR UPDATE ON pipeline_training_jobs FOR EACH ROW EXECUTE FUNCTION remember();
CREATE FUNCTION webhook() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_notify('webhook', NEW.adapter_file_path); RETURN NULL; END $$;
CREATE TRIGGER webhook AFTER UPDATE ON pipeline_training_jobs FOR EACH ROW
    WHEN (NEW.status = 'completed' AND NEW.adapter_file_path IS NOT NULL) EXECUTE FUNCTION webhook()
"""


class Page:
    """A user's page: inserts with a file in the bucket training-files, and waits for what the row says."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        self.pipeline = pipeline
        self._bucket = folder / "storage" / "training-files"

    def insert(self, script: list[list[Any]] | None = None, *, server: bool = False, **columns: Any) -> UUID:
        path = f"{self.pipeline.user}/{uuid4()}.jsonl"
        if "dataset_file_path" not in columns:
            file = self._bucket / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"script": script} if script else {"messages": []}) + "\n")
        return self.pipeline.insert(server=server, **{"dataset_file_path": path} | columns)

    def wait_for(self, row_id: UUID, *status: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            row = self.pipeline.row(row_id)
            return row if row["status"] in status else None

        return eventually(reached, seconds=60, why=lambda: f"not {status}: {self.pipeline.row(row_id)}")

    def history(self, row_id: UUID) -> list[str]:
        """The states that a subscriber has seen, each once for each time that it was entered."""
        rows = self.pipeline.database.run("SELECT status FROM history WHERE row_id = %s ORDER BY n", (row_id,))
        states = [row["status"] for row in rows]
        return [state for before, state in zip([None, *states], states, strict=False) if state != before]


@pytest.fixture
def queue(pipeline: Pipeline, tmp_path: Path) -> Queue:
    return Queue(pipeline.database.dsn, tmp_path)


def test_the_life_of_ten_jobs(queue: Queue, pipeline: Pipeline, tmp_path: Path) -> None:
    page = Page(pipeline, tmp_path)
    with pipeline.database.connect() as admin:
        admin.execute(WATCH.encode())
    diverged = {"code": "non_finite_loss", "message": "The loss is not a number.", "hint": "Lower learning_rate."}
    evaluated = ["say", "evaluated", {"step": 20, "epoch": 1.0, "validation_loss": 0.9}]

    never_began = page.insert(LONG)
    assert pipeline.cancel(never_began) == 1
    first = queue.daemon(tmp_path, name="first", slots=4, cost_per_gpu_hour=3.6)
    with psycopg.connect(pipeline.database.dsn, autocommit=True) as listening:
        listening.execute("LISTEN webhook")
        with first:
            completed = [page.insert([["steps", 20, 0.005], evaluated]), page.insert(server=True)]
            wrong = page.insert(rank=0)
            missing = page.insert(dataset_file_path=f"{pipeline.user}/nowhere.jsonl")
            nan = page.insert([["steps", 5, 0.005], ["say", "failed", diverged], ["exit", 1]])
            for row_id in (*completed, wrong, missing, nan):
                page.wait_for(row_id, *FINAL)
            loading, running, deleted = page.insert([["sleep", 600]]), page.insert(LONG), page.insert(LONG)
            page.wait_for(loading, "initializing")
            assert pipeline.cancel(loading) == 1
            page.wait_for(running, "running")
            assert pipeline.cancel(running) == 1
            page.wait_for(deleted, "running")
            with pipeline.as_server() as app:
                app.execute("DELETE FROM pipeline_training_jobs WHERE id = %s", (deleted,))
            eventually(lambda: not queue.leases(), seconds=30)
            lost = page.insert([["steps", 100, 0.02]])
            page.wait_for(lost, "running")
        with queue.daemon(tmp_path, name="second"):
            page.wait_for(lost, *FINAL)
            webhooks = [note.payload for note in listening.notifies(timeout=2.0)]

    for row_id in (*completed, lost):
        row, job = pipeline.row(row_id), pipeline.job(row_id)
        assert (row["status"], row["progress"], row["adapter_status"]) == ("completed", 100, "stored"), row
        assert row["adapter_file_path"] == job["adapter_path"]
        assert (tmp_path / "storage" / row["adapter_file_path"]).is_file()
        assert row["final_loss"] == 0.1 and row["current_loss"] > 0 and row["tokens_per_second"] > 0
        assert row["current_learning_rate"] == 1e-4 and row["current_step"] > 0
        assert row["started_at"] <= row["completed_at"] and row["training_time_seconds"] >= 0
        assert row["error_message"] is None
    assert sorted(webhooks) == sorted(pipeline.row(row_id)["adapter_file_path"] for row_id in (*completed, lost))
    assert pipeline.row(lost)["adapter_file_path"].endswith("-e2.tar.gz")
    names = {one["metric_name"] for one in pipeline.metrics(completed[0])}
    assert {"training_loss", "validation_loss", "learning_rate"} <= names
    points = queue.points(completed[0])
    assert {one["step_number"] for one in pipeline.metrics(completed[0])} == {point["step"] for point in points}

    for row_id, code, words in (
        (wrong, "invalid_spec", "lora_rank"), (missing, "dataset_unreachable", "nowhere.jsonl"),
        (nan, "non_finite_loss", "Lower learning_rate."),
    ):  # fmt: skip
        row = pipeline.row(row_id)
        assert row["status"] == "failed" and row["error_details"]["code"] == code
        assert words in row["error_message"] and row["adapter_file_path"] is None
    for row_id in (never_began, loading, running):
        row, job = pipeline.row(row_id), pipeline.job(row_id)
        assert row["status"] == job["status"] == "cancelled" and row["completed_at"] == job["completed_at"]
        assert row["adapter_file_path"] is None
    assert pipeline.database.run("SELECT FROM training_jobs WHERE id = %s", (deleted,)) == []

    assert page.history(completed[0]) == ["queued", "initializing", "running", "completed"]
    assert page.history(never_began) == ["queued", "cancelled"]
    assert page.history(loading) == ["queued", "initializing", "cancelled"]
    assert page.history(running) == ["queued", "initializing", "running", "cancelled"]
    assert page.history(lost) == [
        "queued", "initializing", "running", "queued", "initializing", "running", "completed",
    ]  # fmt: skip
    assert pipeline.database.run("SELECT FROM training_front_lags") == []
    told = pipeline.database.run("SELECT message FROM training_events WHERE data ->> 'code' = 'front_failed'")
    assert told == []
