"""The app's own flow over the app's own tables: rows inserted as it inserts them, and all the rows that it expects.

Its tables were there first, with the grants of an older project; then the migrations. The user is `authenticated`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from daemon.schema.migrations import migrate
from daemon.schema.sql_script import split_statements
from tests.daemon_process import SCRIPTED, DaemonProcess, eventually
from tests.doubles.app_routes import LONG, SHORT
from tests.doubles.receiver import Receiver
from tests.doubles.storage import StorageDouble
from tests.lifecycle.queue import write_model_folder
from tests.paths import ROOT
from tests.postgres import AppDatabase, Server, app_job, insert_statement

TESTS = ROOT / "tests"
SCRIPTS = (TESTS.parent / "sql" / "local" / "supabase.sql", TESTS / "app_schema.sql")
FINAL = ("completed", "failed", "cancelled")

SCRIPT = [
    ["steps", 130, 0.03],
    ["say", "evaluated", {"step": 130, "epoch": 3.0, "validation_loss": 0.9}],
]


@dataclass
class App:
    """What the app is: its database, its project's Storage, one user, a receiver of callbacks."""

    database: AppDatabase
    storage: StorageDouble
    receiver: Receiver
    user: UUID
    folder: Path

    def daemon(self, command: tuple[str, ...] = SCRIPTED, **settings: Any) -> DaemonProcess:
        daemon = DaemonProcess(
            self.database.dsn,
            self.folder,
            command=command,
            storage="supabase",
            allowed_hosts=self.receiver.host,
            default_model="acme/tiny",
            **settings,
        )
        daemon.environment |= {"SUPABASE_URL": self.storage.url, "SUPABASE_SERVICE_ROLE_KEY": self.storage.key}
        return daemon

    def insert(self, wish: dict[str, Any], lines: list[str]) -> UUID:
        """As the user, exactly the columns that the app sends; the callback is ours."""
        dataset = self.database.insert_dataset(self.user)
        (row,) = self.database.run("SELECT storage_bucket, storage_path FROM datasets WHERE id = %s", (dataset,))
        self.storage.put(row["storage_bucket"], row["storage_path"], "\n".join(lines).encode())
        job = app_job(self.user, dataset) | wish | {"callback_url": self.receiver.url}
        text, values = insert_statement("training_jobs", job)
        with self.database.acting("authenticated", self.user) as app:
            made = app.execute(text.encode(), values).fetchone()
        assert made is not None
        return UUID(str(made["id"]))

    async def finished(self, job: UUID, seconds: float = 60.0) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            row = self.database.job(job)
            return row if row["status"] in FINAL else None

        return await asyncio.to_thread(eventually, ended, seconds=seconds)

    def seen(self, statement: str, job: UUID) -> list[dict[str, Any]]:
        """What the user's own session reads."""
        with self.database.acting("authenticated", self.user) as app:
            return app.execute(statement.encode(), {"job": job}).fetchall()


@pytest.fixture
def living(postgres: Server) -> Iterator[AppDatabase]:
    with postgres.database() as name:
        app = AppDatabase(postgres.dsn(name))
        for script in SCRIPTS:
            for statement in split_statements(script.read_text()):
                app.run(statement)
        migrate(app.dsn, local=True)
        yield app
        app.close()


@pytest.fixture
async def app(living: AppDatabase, tmp_path: Path) -> AsyncIterator[App]:
    write_model_folder(tmp_path / "models" / "acme" / "tiny")
    async with StorageDouble(tmp_path / "double") as storage, Receiver() as receiver:
        yield App(living, storage, receiver, living.insert_user(), tmp_path)


async def test_a_row_as_the_app_inserts_it_ends_with_all_the_rows_that_the_app_expects(app: App) -> None:
    with app.daemon(cost_per_gpu_hour=3.6):
        job = app.insert(SHORT, [json.dumps({"script": SCRIPT})])
        row = await app.finished(job)
        await app.receiver.wait_for(lambda all_: any(one.payload["event"] == "job.completed" for one in all_), 30)
    assert row["status"] == "completed", row["error_message"]
    assert row["progress"] == 100 and row["current_stage"] == "completed" and row["final_cost"] is not None
    assert row["external_job_id"] is None and row["estimated_completion_at"] is None

    (seen,) = app.seen("SELECT * FROM training_jobs WHERE id = %(job)s", job)
    assert seen == row
    (artifact,) = app.seen("SELECT * FROM model_artifacts WHERE job_id = %(job)s", job)
    assert artifact["id"] == row["artifact_id"] and artifact["status"] == "stored" and artifact["version"] == "1.0.0"
    assert {"adapter_model", "adapter_config", "training_logs", "metrics_chart"} <= set(artifact["artifacts"])
    for path in artifact["artifacts"].values():
        assert app.storage.path_of("lora-models", path).is_file(), path
    wanted = {"final_training_loss", "final_validation_loss", "perplexity", "loss_reduction_percent",
              "convergence_quality", "overall_score"}  # fmt: skip
    assert wanted <= set(artifact["quality_metrics"])
    wanted = {"epochs_completed", "total_steps", "final_loss", "training_duration_hours", "total_cost"}
    assert wanted <= set(artifact["training_summary"])
    assert artifact["configuration"]["hyperparameters"] == SHORT["hyperparameters"]
    # Which model it was, whoever chose it.
    assert artifact["name"].startswith("tiny on ") and artifact["configuration"]["base_model"] == "acme/tiny"
    assert row["base_model"] == row["trained_with"]["base_model"] == "acme/tiny"
    assert artifact["configuration"]["trained_with"] == row["trained_with"] and row["trained_with"]["first_step_at"]

    (cost,) = app.seen("SELECT * FROM cost_records WHERE job_id = %(job)s", job)
    assert cost["cost_type"] == "training_compute" and cost["amount"] == row["final_cost"]
    assert {"gpu_type", "gpu_count", "duration_hours"} <= set(cost["details"]) and cost["billing_period"]
    notes = app.seen(
        "SELECT * FROM notifications WHERE metadata ->> 'job_id' = %(job)s::text "
        "OR action_url = '/training/jobs/' || %(job)s::text ORDER BY created_at", job
    )  # fmt: skip
    assert {"job_started", "job_completed"} <= {note["type"] for note in notes}
    points = app.seen("SELECT * FROM metrics_points WHERE job_id = %(job)s ORDER BY step", job)
    # Few enough for the app's chart, which asks for the first hundred; the whole run all the same.
    assert [point["step"] for point in points] == [1, *range(2, 131, 2)]
    assert points[-1]["validation_loss"] is not None
    kinds = [
        event["kind"] for event in app.seen("SELECT kind FROM training_events WHERE job_id = %(job)s ORDER BY id", job)
    ]
    assert [kind for kind in kinds if kind in ("queued", "claimed", "started", "completed")] == [
        "queued", "claimed", "started", "completed",
    ]  # fmt: skip
    told = [one.payload for one in app.receiver.received]
    states = [one["event"] for one in told if one["event"] != "job.progress"]
    assert states == ["job.initializing", "job.started", "job.completed"]
    assert [one["event"] for one in told].count("job.progress") >= 1
    # A receiver that drops what is older than what it has seen loses nothing.
    assert [one["sequence"] for one in told] == sorted(one["sequence"] for one in told)
    assert {one["status"] for one in told[:-1]} == {"running"} and told[-1]["status"] == "completed"


async def test_a_run_that_diverges_fails_with_its_code_and_keeps_the_points_before_it(app: App) -> None:
    after = {"step": 21, "total_steps": 40, "epoch": 0.5, "learning_rate": 1e-4, "tokens_per_second": 0.0}
    diverged = {
        "code": "non_finite_loss", "message": "The loss is not a number at step 22.", "hint": "Lower learning_rate."
    }  # fmt: skip
    script = [
        ["steps", 20, 0.005],
        ["say", "progress", after | {"loss": 1e12, "grad_norm": 1e30}],
        ["say", "progress", after | {"step": 22, "loss": "NaN", "grad_norm": "Infinity"}],
        ["say", "failed", diverged],
        ["exit", 1],
    ]
    with app.daemon():
        job = app.insert(LONG, [json.dumps({"script": script})])
        row = await app.finished(job)
    assert (row["status"], row["error_code"], row["attempt"]) == ("failed", "non_finite_loss", 1)
    assert row["error_message"].startswith("The loss is not a number") and row["error_hint"] == "Lower learning_rate."
    points = app.seen("SELECT * FROM metrics_points WHERE job_id = %(job)s ORDER BY step", job)
    assert [point["step"] for point in points] == list(range(1, 22))
    assert points[-1]["gradient_norm"] is None and float(points[-1]["training_loss"]) == 9999.999999
    assert points[-1]["throughput"] == 0 and all(0 < point["training_loss"] < 3 for point in points[:-1])


async def test_side_tables_that_refuse_everything_never_fail_a_training(app: App) -> None:
    for table in ("model_artifacts", "cost_records", "notifications"):
        app.database.run(f"ALTER TABLE {table} ADD CONSTRAINT nothing_more CHECK (false) NOT VALID")
    with app.daemon():
        job = app.insert(LONG, [json.dumps({"script": [["steps", 20, 0.005]]})])
        row = await app.finished(job)
    assert row["status"] == "completed" and row["artifact_id"] is None and row["adapter_path"]
    refused = app.seen("SELECT data FROM training_events WHERE job_id = %(job)s AND kind = 'notice'", job)
    assert refused, "the story says nothing of what could not be written"
