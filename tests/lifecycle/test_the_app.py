"""The app as it is, from its routes to its pages: its schema, its files, its rows, a real daemon and a real trainer.

One user's day is lived once: a job for each of the app's four formats, one of them by its newer table; a job that is
cancelled while it trains and one that is cancelled while it waits; and one whose file is no dataset. The model has the
template of Mistral-7B-Instruct-v0.2, which refuses a system turn and two turns of one role. No row names a base model.
Then each test reads what one page reads.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from daemon.schema.fronts import fronts
from daemon.schema.migrations import bring_up_to_date
from tests.chat_templates import template_text
from tests.daemon_process import FORKED_REAL, DaemonProcess, eventually
from tests.doubles.app_data import app_conversations, write_app_data
from tests.doubles.app_routes import LONG, SHORT, AppRoutes
from tests.doubles.storage import StorageDouble
from tests.fronts.pipeline import app_tables
from tests.postgres import AppDatabase, Server
from tests.tiny_models import make_model, make_tokenizer

MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
TRAINED = ("messages", "pairs", "v4", "turns")
FINAL = ("completed", "failed", "cancelled")
METRICS = {"training_loss", "validation_loss", "learning_rate", "throughput", "gpu_utilization", "gradient_norm"}
pytestmark = [pytest.mark.timeout(420), pytest.mark.together]
# What a page that watches by Realtime is sent.
WATCH = """
CREATE TABLE seen (n bigserial, relation text, id uuid, row jsonb);
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
    INSERT INTO public.seen (relation, id, row) VALUES (TG_TABLE_NAME, NEW.id, to_jsonb(NEW));
    RETURN NULL;
END $$;
CREATE TRIGGER zz_see AFTER INSERT OR UPDATE ON training_jobs FOR EACH ROW EXECUTE FUNCTION see();
CREATE TRIGGER zz_see AFTER INSERT OR UPDATE ON pipeline_training_jobs FOR EACH ROW EXECUTE FUNCTION see()
"""


@dataclass
class Day:
    """One day of the app, lived to its end: its jobs by name, and the folder of its buckets."""

    app: AppRoutes
    buckets: Path
    jobs: dict[str, UUID] = field(default_factory=dict)

    def seen(self, name: str, relation: str = "training_jobs") -> list[dict[str, Any]]:
        rows = self.app.database.run(
            "SELECT row FROM seen WHERE id = %s AND relation = %s ORDER BY n", (self.jobs[name], relation)
        )
        return [row["row"] for row in rows]

    def story(self, name: str) -> dict[str, dict[str, Any]]:
        """The last event of each kind, as the user reads it."""
        events = self.app.read("SELECT * FROM training_events WHERE job_id = %(id)s ORDER BY id", id=self.jobs[name])
        return {event["kind"]: event for event in events}


@pytest.fixture(scope="module")
def day(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    folder = tmp_path_factory.mktemp("app")
    strict = make_tokenizer(template_text("mistral-v0.2"), bos="<s>", eos="</s>")
    make_model(
        folder / "models" / MODEL, "mistral", tokenizer=strict, num_hidden_layers=1, intermediate_size=64,
        max_position_embeddings=4096,
    )  # fmt: skip
    with postgres.database() as name:
        database = AppDatabase(postgres.dsn(name))
        # The app was there first, with both of its modules; then ours over it, and the front.
        app_tables(database)
        bring_up_to_date(database.dsn, local=False, fronts=[fronts()["pipeline"]])
        with database.connect() as admin:
            admin.execute(WATCH.encode())
        yield asyncio.run(live(database, folder))
        database.close()


async def live(database: AppDatabase, folder: Path) -> Day:
    async with StorageDouble(folder / "double") as storage:
        day = Day(AppRoutes(database, database.insert_user(), storage.put), storage.path_of("", ""))
        daemon = DaemonProcess(
            database.dsn, folder, command=FORKED_REAL, storage="supabase", default_model=MODEL, cost_per_gpu_hour=3600
        )
        daemon.environment |= {"SUPABASE_URL": storage.url, "SUPABASE_SERVICE_ROLE_KEY": storage.key}
        with daemon:
            await asyncio.to_thread(live_through, day, daemon, folder)
            # It ends the trainer that it has begun to start anew; killed, it might leave it to import its libraries.
            daemon.signal(signal.SIGTERM)
            await asyncio.to_thread(daemon.wait)
        return day


def live_through(day: Day, daemon: DaemonProcess, folder: Path) -> None:
    app, jobs = day.app, day.jobs

    def until(name: str, *status: str) -> None:
        def reached() -> bool:
            return app.database.job(jobs[name])["status"] in status

        eventually(reached, seconds=150, why=lambda: f"{name}: {app.job(jobs[name])}\n{daemon.tail()}")

    messages = write_app_data(folder / "messages.jsonl", "messages", 5)
    dataset = app.upload_dataset(messages)
    jobs["waiting"] = app.create_job(dataset, LONG)
    app.cancel_job(jobs["waiting"])

    jobs["messages"] = app.create_job(dataset, LONG)
    short_talks = app_conversations(5, exchanges=2)
    pairs = app.import_from_training_file(write_app_data(folder / "pairs.jsonl", "pairs", short_talks))
    jobs["pairs"] = app.create_job(pairs, changed(SHORT, batch_size=1, epochs=15))
    v4 = app.upload_dataset(write_app_data(folder / "elena.json", "v4", 5))
    jobs["v4"] = app.create_job(v4, changed(SHORT, epochs=1), server=True)
    _, path = app.export_training_file(write_app_data(folder / "turns.jsonl", "turns", 5))
    jobs["turns"] = app.create_pipeline_job(path)
    for name in TRAINED:
        until(name, *FINAL)

    jobs["cancelled"] = app.create_job(dataset, changed(LONG, num_epochs=50))
    until("cancelled", "running", *FINAL)
    app.cancel_job(jobs["cancelled"])
    bad = folder / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"prompt": "Hello?", "reply": "Hello."}\n')
    jobs["bad"] = app.create_job(app.upload_dataset(bad), LONG)
    until("bad", *FINAL)


def changed(settings: dict[str, Any], **values: object) -> dict[str, Any]:
    return settings | {"hyperparameters": settings["hyperparameters"] | values}


# The job's page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_every_format_trains_with_a_template_that_wants_alternating_roles_and_no_system(day: Day, name: str) -> None:
    row, story = day.app.job(day.jobs[name]), day.story(name)
    assert (row["status"], row["error_message"], row["retry_count"]) == ("completed", None, 0)
    plan = story["planned"]["data"]
    assert plan["data"]["format"] == {"v4": "pairs"}.get(name, name)
    # Held out by conversation; in each file one answer is not written yet.
    assert (plan["train_conversations"], plan["validation_conversations"]) == (4, 1)
    answers = plan["train_answers"] + plan["validation_answers"]
    assert answers == (9 if name == "pairs" else 19)
    if name in ("pairs", "v4"):
        assert f"The history of {answers} pairs ends with current_user_input" in story["repeated_in_history"]["message"]
    if name != "turns":
        assert "no system role" in story["system_folded"]["message"]


@pytest.mark.parametrize("name", TRAINED)
def test_the_job_page_shows_a_finished_job_as_finished(day: Day, name: str) -> None:
    row, asked = day.app.job(day.jobs[name]), day.seen(name)[0]
    assert (row["status"], row["current_stage"], row["progress"]) == ("completed", "completed", 100)
    assert row["current_epoch"] == row["total_epochs"] == asked["total_epochs"]
    # What the app guessed is corrected.
    assert row["current_step"] == row["total_steps"] != asked["total_steps"]
    assert set(row["current_metrics"]) >= METRICS
    assert 0 < row["current_metrics"]["training_loss"] < 20 and 0 < row["current_metrics"]["validation_loss"] < 20
    assert row["current_metrics"]["throughput"] > 0 and row["current_metrics"]["gradient_norm"] > 0
    assert row["current_cost"] == row["final_cost"] > 0
    assert row["queued_at"] <= row["started_at"] < row["completed_at"]
    assert row["estimated_completion_at"] is None and row["external_job_id"] is None
    assert row["error_message"] is row["error_stack"] is None


@pytest.mark.parametrize("name", TRAINED)
def test_a_page_that_watches_sees_every_state_in_its_order_and_progress_that_never_falls(day: Day, name: str) -> None:
    seen = day.seen(name)
    assert order(row["status"] for row in seen) == ["queued", "initializing", "running", "completed"]
    progress = [row["progress"] for row in seen]
    assert progress == sorted(progress) and progress[0] == 0 and progress[-1] == 100
    trains = [row for row in seen if row["status"] == "running"]
    assert all(set(row["current_metrics"]) >= METRICS for row in trains if row["current_step"] > 0)
    assert all(0 <= row["current_step"] <= row["total_steps"] for row in trains)
    assert {row["current_stage"] for row in trains} <= {"training", "evaluating", "saving", "uploading"}
    assert any(row["estimated_completion_at"] for row in trains) and trains[-1]["current_cost"] > 0


def order(states: Iterable[str]) -> list[str]:
    return [state for state, _ in itertools.groupby(states)]


@pytest.mark.parametrize("name", TRAINED)
def test_the_chart_of_the_first_hundred_points_is_the_whole_curve(day: Day, name: str) -> None:
    row, points = day.app.job(day.jobs[name]), day.app.chart(day.jobs[name])
    steps = [point["step"] for point in points]
    assert steps == sorted(set(steps)) and len(steps) <= 100
    assert (steps[0], steps[-1]) == (1, row["total_steps"])
    if name == "pairs":
        assert row["total_steps"] > 100, "this one is longer than the page can show point by point"
    else:
        assert steps == list(range(1, row["total_steps"] + 1))
    assert all(0 < point["training_loss"] < 20 and point["throughput"] > 0 for point in points)
    assert all(point["learning_rate"] >= 0 and point["gradient_norm"] > 0 for point in points)
    assert [point["epoch"] for point in points] == sorted(point["epoch"] for point in points)
    held_out = [point for point in points if point["validation_loss"] is not None]
    assert len(held_out) == row["total_epochs"] and held_out[-1] is points[-1]
    assert float(points[-1]["validation_loss"]) == pytest.approx(row["current_metrics"]["validation_loss"], abs=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_the_job_says_what_it_was_trained_with_though_no_row_names_a_model(day: Day, name: str) -> None:
    row, asked = day.app.job(day.jobs[name]), day.seen(name)[0]
    assert ("base_model" in asked["hyperparameters"]) == (name == "turns"), "the front names its own"
    assert row["hyperparameters"] == asked["hyperparameters"] and row["gpu_config"] == asked["gpu_config"]
    assert row["base_model"] == row["trained_with"]["base_model"] == MODEL
    wish, used = asked["hyperparameters"], row["trained_with"]["hyperparameters"]
    for short in ("epochs", "rank", "alpha", "dropout"):
        long = "num_epochs" if short == "epochs" else f"lora_{short}"
        assert used[long] == wish.get(long, wish.get(short))
    assert (used["learning_rate"], used["batch_size"]) == (wish["learning_rate"], wish["batch_size"])
    assert used["weight_decay"] == wish.get("weight_decay", 0) and used["max_length"] > 0


# The page of its models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_the_models_page_shows_the_adapter_and_its_downloads_lie_in_the_bucket(day: Day, name: str) -> None:
    row = day.app.job(day.jobs[name])
    (model,) = day.app.models(day.jobs[name])
    assert (model["id"], model["dataset_id"]) == (row["artifact_id"], row["dataset_id"])
    assert (model["status"], model["version"], model["parent_model_id"]) == ("stored", "1.0.0", None)
    title = {"v4": "elena", "turns": "Conversations"}.get(name, name)
    assert model["name"] == f"Mistral-7B-Instruct-v0.2 on {title}"
    assert model["configuration"]["base_model"] == MODEL
    for key in ("hyperparameters", "gpu_config", "trained_with"):
        assert model["configuration"][key] == row[key]

    quality, summary = model["quality_metrics"], model["training_summary"]
    assert set(quality) == {
        "final_training_loss", "final_validation_loss", "perplexity", "loss_reduction_percent", "convergence_quality",
        "overall_score",
    }  # fmt: skip
    assert quality["perplexity"] == pytest.approx(math.exp(quality["final_validation_loss"]))
    assert 1 <= quality["overall_score"] <= 5 and quality["convergence_quality"]
    assert (summary["epochs_completed"], summary["total_steps"]) == (row["total_epochs"], row["total_steps"])
    assert summary["final_loss"] == quality["final_training_loss"] > 0
    assert summary["training_duration_hours"] > 0 and summary["total_cost"] == pytest.approx(float(row["final_cost"]))

    assert {"adapter_model", "adapter_config", "training_logs", "metrics_chart"} <= set(model["artifacts"])
    files = {key: day.buckets / "lora-models" / path for key, path in model["artifacts"].items()}
    assert all(file.stat().st_size > 0 for file in files.values())
    assert json.loads(files["adapter_config"].read_text())["base_model_name_or_path"] == MODEL
    assert files["metrics_chart"].read_bytes().startswith(b"\x89PNG")
    archive = day.buckets / row["adapter_path"]
    assert (archive, archive.stat().st_size) == (files["archive"], row["adapter_bytes"])


# The page of its costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRAINED, "cancelled", "bad"])
def test_each_job_that_ran_is_billed_once(day: Day, name: str) -> None:
    row = day.app.job(day.jobs[name])
    (record,) = day.app.costs(day.jobs[name])
    assert (record["cost_type"], record["amount"]) == ("training_compute", row["final_cost"])
    assert record["billing_period"] == row["completed_at"].date().replace(day=1)
    details = record["details"]
    assert details["gpu_type"] == ("NVIDIA A40" if name == "turns" else "H100") and details["gpu_count"] == 1
    # A dollar a second, until its trainer had ended.
    charged = float(record["amount"]) - 3600 * details["duration_hours"]
    assert -0.5 < charged < 0.5


# Its notifications --------------------------------------------------------------------------------------------------


def test_the_user_is_told_each_thing_once_by_whomever(day: Day) -> None:
    told = {name: day.app.notifications(job) for name, job in day.jobs.items()}
    types = {name: [note["type"] for note in notes] for name, notes in told.items()}
    done = ["job_started", "job_completed", "artifact_ready"]
    assert types == {
        "waiting": ["job_queued", "job_cancelled"],
        "messages": ["job_queued", *done],
        "pairs": ["job_queued", *done],
        "v4": ["job_queued", *done],
        # The newer page sends none of its own.
        "turns": done,
        "cancelled": ["job_queued", "job_started", "job_cancelled"],
        "bad": ["job_queued", "job_failed"],
    }
    for name, notes in told.items():
        for note in notes:
            artifact = day.app.job(day.jobs[name])["artifact_id"]
            page = f"/models/{artifact}" if note["type"] == "artifact_ready" else f"/training/jobs/{day.jobs[name]}"
            assert note["action_url"] == page and note["priority"] in ("low", "medium", "high")
            assert 0 < len(note["title"]) <= 200 and note["message"] and note["read"] is False
    (failed,) = (note for note in told["bad"] if note["type"] == "job_failed")
    assert failed["priority"] == "high" and failed["message"] == day.app.job(day.jobs["bad"])["error_message"]


# A job that fails, and two that are cancelled -----------------------------------------------------------------------


def test_the_page_of_a_failed_job_says_what_happened_and_what_to_do_in_one_text(day: Day) -> None:
    row = day.app.job(day.jobs["bad"])
    assert (row["status"], row["error_code"], row["attempt"]) == ("failed", "dataset_invalid", 1)
    text = row["error_message"]
    assert text.startswith("2 rows of the dataset cannot be used: line 1: 'messages' is empty; line 2: ")
    assert text.endswith(row["error_hint"]) and row["error_hint"] in text
    assert "/" not in text.replace("and/or", "") and "Traceback" not in text
    assert row["completed_at"] and row["final_cost"] == row["current_cost"] and row["artifact_id"] is None
    assert row["base_model"] == MODEL
    assert day.app.models(day.jobs["bad"]) == [] and day.app.chart(day.jobs["bad"]) == []


def test_a_cancel_by_the_apps_own_update_stops_the_training_and_keeps_what_it_cost(day: Day) -> None:
    row = day.app.job(day.jobs["cancelled"])
    assert (row["status"], row["error_message"], row["artifact_id"]) == ("cancelled", None, None)
    assert 0 < row["progress"] < 100 and row["completed_at"] and row["estimated_completion_at"] is None
    assert row["final_cost"] == row["current_cost"] > 0
    assert order(one["status"] for one in day.seen("cancelled")) == ["queued", "initializing", "running", "cancelled"]
    assert day.app.chart(day.jobs["cancelled"])[0]["step"] == 1 and day.app.models(day.jobs["cancelled"]) == []
    assert day.app.database.run("SELECT FROM training_leases") == []


def test_a_job_that_is_cancelled_while_it_waits_never_begins(day: Day) -> None:
    row = day.app.job(day.jobs["waiting"])
    assert (row["status"], row["started_at"], row["attempt"], row["final_cost"]) == ("cancelled", None, 0, Decimal(0))
    assert row["completed_at"] and day.app.costs(day.jobs["waiting"]) == []


# The newer page -----------------------------------------------------------------------------------------------------


def test_the_newer_page_shows_the_same_job(day: Day) -> None:
    row, job = day.app.pipeline_job(day.jobs["turns"]), day.app.job(day.jobs["turns"])
    (model,) = day.app.models(day.jobs["turns"])
    assert (row["status"], row["progress"], row["error_message"], row["error_details"]) == (
        "completed",
        100,
        None,
        None,
    )
    for column in ("current_epoch", "current_step", "total_steps", "started_at", "completed_at"):
        assert row[column] == job[column]
    metrics = job["current_metrics"]
    assert (row["current_loss"], row["current_learning_rate"], row["tokens_per_second"]) == (
        metrics["training_loss"], metrics["learning_rate"], metrics["throughput"],
    )  # fmt: skip
    assert row["final_loss"] == model["training_summary"]["final_loss"] and row["actual_cost"] == job["final_cost"]
    assert row["training_time_seconds"] == round((row["completed_at"] - row["started_at"]).total_seconds())
    assert (row["adapter_status"], row["adapter_file_path"]) == ("stored", job["adapter_path"])
    assert (day.buckets / row["adapter_file_path"]).is_file()
    # Its deployment writes these.
    assert row["adapter_download_url"] is row["runpod_endpoint_id"] is None and row["runpod_job_id"] == str(row["id"])
    assert (row["rank"], row["epochs"], row["learning_rate"]) == (16, 3, 1e-4)
    seen = day.seen("turns", "pipeline_training_jobs")
    assert order(one["status"] for one in seen) == ["queued", "initializing", "running", "completed"]
    assert [one["adapter_file_path"] is not None for one in seen].count(True) == 1, "a webhook on it fires once"


def test_the_newer_pages_metrics_are_the_points_of_the_chart(day: Day) -> None:
    rows, points = day.app.pipeline_metrics(day.jobs["turns"]), day.app.chart(day.jobs["turns"])
    assert {row["metric_level"] for row in rows} == {"universal"}
    for name, column in (("training_loss", "training_loss"), ("validation_loss", "validation_loss"),
                         ("learning_rate", "learning_rate"), ("gradient_norm", "gradient_norm"),
                         ("tokens_per_second", "throughput")):  # fmt: skip
        shown = {row["step_number"]: row["value"] for row in rows if row["metric_name"] == row["metric_id"] == name}
        assert shown == {p["step"]: float(p[column]) for p in points if p[column] is not None}


# Whose it is, and the other order -----------------------------------------------------------------------------------


def test_nobody_else_sees_any_of_it(day: Day) -> None:
    stranger = AppRoutes(day.app.database, day.app.database.insert_user(), day.app.put)
    for table in (
        "training_jobs", "metrics_points", "model_artifacts", "cost_records", "notifications", "training_events",
        "datasets", "pipeline_training_jobs", "pipeline_training_metrics",
    ):  # fmt: skip
        assert day.app.read(f"SELECT * FROM {table} LIMIT 1") and stranger.read(f"SELECT * FROM {table}") == [], table


def test_the_routes_work_as_well_where_ours_was_there_first(database: AppDatabase, tmp_path: Path) -> None:
    app_tables(database, ("tests/app_schema.sql", "tests/app_pipeline_schema.sql"))
    bring_up_to_date(database.dsn, local=True, fronts=[fronts()["pipeline"]])
    stored: dict[str, bytes] = {}
    app = AppRoutes(database, database.insert_user(), lambda bucket, path, content: stored.update({path: content}))
    file = write_app_data(tmp_path / "talks.jsonl", "messages", 2)
    jobs = [
        app.create_job(app.upload_dataset(file), LONG),
        app.create_job(app.import_from_training_file(file), SHORT, server=True),
        app.create_pipeline_job(app.export_training_file(file)[1]),
    ]
    assert all(database.job(job)["due"] for job in jobs) and len(stored) == 3
    for job in jobs[:2]:
        app.cancel_job(job)
    app.cancel_pipeline_job(jobs[2])
    assert {database.job(job)["status"] for job in jobs} == {app.pipeline_job(jobs[2])["status"]} == {"cancelled"}
    assert [note["type"] for note in app.notifications(jobs[0])] == ["job_queued", "job_cancelled"]
