"""The app's routes and pages: what they write into the database and its buckets and what they read there, as whom.

A route acts for a signed-in user with the user's own rights, unless it is said to be the app's server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from tests.postgres import AppDatabase, insert_statement

# The two ways in which the app spells the same settings. None names a base model.
LONG = {
    "hyperparameters": {
        "learning_rate": 2e-4, "batch_size": 4, "num_epochs": 3, "lora_rank": 16, "lora_alpha": 32,
        "lora_dropout": 0.05, "warmup_steps": 5, "weight_decay": 0.01,
    },
    "gpu_config": {"gpu_type": "H100", "num_gpus": 1, "gpu_memory_gb": 80, "cost_per_gpu_hour": 3.5},
}  # fmt: skip
SHORT = {
    "hyperparameters": {"learning_rate": 2e-4, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.05},
    "gpu_config": {"type": "H100", "count": 1},
}
JOB_TITLES = {"job_queued": "Training job queued", "job_cancelled": "Training job cancelled"}


@dataclass
class AppRoutes:
    """The app with one user. `put` stores an object: bucket, path, content."""

    database: AppDatabase
    user: UUID
    put: Callable[[str, str, bytes], None]

    # -- routes ------------------------------------------------------------------------------------------------------

    def upload_dataset(self, file: Path) -> UUID:
        """The upload: a row, the file, and the verdict that the app's validation writes as its server."""
        dataset = uuid4()
        path = f"{self.user}/{dataset}/{file.name}"
        self._insert(
            "datasets",
            id=dataset, user_id=self.user, name=file.stem, storage_bucket="lora-datasets", storage_path=path,
            file_name=file.name, file_size=file.stat().st_size, status="uploading", training_ready=False,
        )  # fmt: skip
        self.put("lora-datasets", path, file.read_bytes())
        with self.database.acting("service_role") as server:
            server.execute(
                "UPDATE datasets SET status = 'ready', training_ready = true, validated_at = now(), "
                "error_message = NULL WHERE id = %s",
                (dataset,),
            )
        return dataset

    def export_training_file(self, file: Path) -> tuple[UUID, str]:
        """The export of conversations: a row of training_files and its file. Returns the row's id and the path."""
        made = uuid4()
        path = f"{made}/training.jsonl"
        self._insert(
            "training_files",
            id=made, name=file.stem, json_file_path=f"{made}/training.json", jsonl_file_path=path, created_by=self.user,
            jsonl_file_size=file.stat().st_size,
        )  # fmt: skip
        self.put("training-files", path, file.read_bytes())
        return made, path

    def import_from_training_file(self, file: Path) -> UUID:
        """The import: a dataset that names the exported file where it lies."""
        _, path = self.export_training_file(file)
        return self._insert(
            "datasets",
            user_id=self.user, name=file.stem, storage_bucket="training-files", storage_path=path,
            file_name="training.jsonl", file_size=file.stat().st_size, status="ready", training_ready=True,
        )  # fmt: skip

    def create_job(self, dataset: UUID, settings: Mapping[str, Any], *, server: bool = False) -> UUID:
        """The page "start training": the row, then a notification of the app's own."""
        chosen = settings["hyperparameters"]
        job = self._insert(
            "training_jobs",
            server,
            user_id=self.user, dataset_id=dataset, preset_id="balanced", **settings, status="queued",
            current_stage="queued", progress=0, current_epoch=0, current_step=0,
            total_epochs=chosen.get("num_epochs", chosen.get("epochs")), total_steps=300, current_cost=0,
            estimated_total_cost=7.5,
        )  # fmt: skip
        self._notify(job, "job_queued")
        return job

    def cancel_job(self, job: UUID) -> None:
        with self.database.acting("authenticated", self.user) as app:
            app.execute(
                "UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = current_cost "
                "WHERE id = %s",
                (job,),
            )
        self._notify(job, "job_cancelled")

    def create_pipeline_job(self, path: str, **settings: Any) -> UUID:
        """The newer page: a row of its own table, with the file's path in training-files."""
        return self._insert(
            "pipeline_training_jobs",
            **{
                "user_id": self.user, "job_name": "Elena, warmer", "status": "pending",
                "training_sensitivity": "medium", "training_progression": "medium", "training_repetition": 3,
                "learning_rate": 1e-4, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.05,
                "dataset_name": "Conversations", "dataset_file_path": path, "gpu_type": "NVIDIA A40", "gpu_count": 1,
                "estimated_cost": 2.5,
            } | settings,
        )  # fmt: skip

    def cancel_pipeline_job(self, row: UUID) -> None:
        with self.database.acting("authenticated", self.user) as app:
            app.execute("UPDATE pipeline_training_jobs SET status = 'cancelled' WHERE id = %s", (row,))

    # -- pages -------------------------------------------------------------------------------------------------------

    def read(self, statement: str, **parameters: object) -> list[dict[str, Any]]:
        with self.database.acting("authenticated", self.user) as app:
            return app.execute(statement.encode(), parameters).fetchall()

    def job(self, job: UUID) -> dict[str, Any]:
        (row,) = self.read("SELECT * FROM training_jobs WHERE id = %(id)s", id=job)
        return row

    def chart(self, job: UUID) -> list[dict[str, Any]]:
        """The points that the job page draws: the first hundred."""
        return self.read("SELECT * FROM metrics_points WHERE job_id = %(id)s ORDER BY timestamp ASC LIMIT 100", id=job)

    def models(self, job: UUID) -> list[dict[str, Any]]:
        return self.read("SELECT * FROM model_artifacts WHERE job_id = %(id)s AND deleted_at IS NULL", id=job)

    def costs(self, job: UUID) -> list[dict[str, Any]]:
        return self.read("SELECT * FROM cost_records WHERE job_id = %(id)s", id=job)

    def notifications(self, job: UUID) -> list[dict[str, Any]]:
        return self.read(
            "SELECT * FROM notifications WHERE user_id = %(user)s AND (metadata ->> 'job_id' = %(job)s::text "
            "OR action_url = '/training/jobs/' || %(job)s::text) ORDER BY created_at",
            user=self.user, job=job,
        )  # fmt: skip

    def pipeline_job(self, row: UUID) -> dict[str, Any]:
        (found,) = self.read("SELECT * FROM pipeline_training_jobs WHERE id = %(id)s", id=row)
        return found

    def pipeline_metrics(self, row: UUID) -> list[dict[str, Any]]:
        return self.read(
            "SELECT * FROM pipeline_training_metrics WHERE job_id = %(id)s ORDER BY step_number, metric_name", id=row
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _notify(self, job: UUID, type_: str) -> None:
        self._insert(
            "notifications",
            user_id=self.user, type=type_, title=JOB_TITLES[type_], message=f"{JOB_TITLES[type_]}.", priority="low",
            action_url=f"/training/jobs/{job}", metadata={"job_id": str(job)},
        )  # fmt: skip

    def _insert(self, table: str, server: bool = False, **columns: Any) -> UUID:
        text, values = insert_statement(table, columns)
        with self.database.acting(*(("service_role",) if server else ("authenticated", self.user))) as app:
            made = app.execute(text.encode(), values).fetchone()
        assert made is not None
        row: UUID = made["id"]
        return row
