"""The app's side of the table, for tests: inserts jobs as the app does, cancels as their owner, reads the endings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from tests.daemon_process import DaemonProcess, eventually

FINAL = ("completed", "failed", "cancelled")


class Queue:
    """One migrated database with one user, and the folder that its datasets and models lie in."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self._kept: psycopg.Connection[dict[str, Any]] | None = None
        self.dsn = dsn
        self.folder = folder
        self.user_id = uuid4()
        self.select("INSERT INTO auth.users (id, email) VALUES (%s, %s)", self.user_id, f"{self.user_id}@example.test")
        write_model_folder(folder / "models" / "tiny")

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        return psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row)

    def select(self, statement: str, *parameters: object) -> list[dict[str, Any]]:
        """One statement on the connection that is kept for all of them: a new one takes thirty times as long."""
        kept = self._kept
        if kept is not None and not kept.closed:
            try:
                return _rows(kept, statement, parameters)
            except psycopg.OperationalError:
                if not kept.closed:
                    raise
        # The first one, or the test ended the server or this session.
        self._kept = self.connect()
        self._kept.prepare_threshold = None  # a test may alter the tables
        return _rows(self._kept, statement, parameters)

    def close(self) -> None:
        """End the kept connection; the next statement makes another."""
        if self._kept is not None:
            self._kept.close()

    def __del__(self) -> None:
        self.close()

    def daemon(self, folder: Path, **settings: Any) -> DaemonProcess:
        return DaemonProcess(self.dsn, folder, **settings)

    def insert(
        self,
        *,
        script: Sequence[Sequence[object]] | None = None,
        lines: Sequence[str] | None = None,
        hyperparameters: dict[str, Any] | None = None,
        storage_path: str | None = None,
        run_after_seconds: float | None = None,
        deadline_seconds: float | None = None,
        user_id: UUID | None = None,
        **columns: object,
    ) -> UUID:
        """Insert a dataset and a job on it; the dataset carries the scripted trainer's script."""
        user_id = user_id or self.user_id
        dataset_id = uuid4()
        path = storage_path or f"{user_id}/{dataset_id}.jsonl"
        if storage_path is None:
            file = self.folder / "storage" / "lora-datasets" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            content = lines if lines is not None else [json.dumps({"script": script} if script else {"messages": []})]
            file.write_text("\n".join(content) + "\n")
        else:
            path = f"{user_id}/{storage_path}"
        with self.connect() as connection, connection.transaction():
            connection.execute(
                "INSERT INTO datasets (id, user_id, name, storage_path, file_name, file_size) "
                "VALUES (%s, %s, 'A dataset', %s, 'data.jsonl', 1)",
                (dataset_id, user_id, path),
            )
            given: dict[str, object] = {
                "user_id": user_id,
                "dataset_id": dataset_id,
                "hyperparameters": Jsonb(hyperparameters or {"base_model": "tiny"}),
                **columns,
            }
            if run_after_seconds is not None:
                given["run_after"] = self._now(connection) + timedelta(seconds=run_after_seconds)
            if deadline_seconds is not None:
                given["deadline_at"] = self._now(connection) + timedelta(seconds=deadline_seconds)
            names = ", ".join(given)
            places = ", ".join(["%s"] * len(given))
            row = connection.execute(
                f"INSERT INTO training_jobs ({names}) VALUES ({places}) RETURNING id", list(given.values())
            ).fetchone()
        assert row is not None
        return UUID(str(row["id"]))

    @staticmethod
    def _now(connection: psycopg.Connection[dict[str, Any]]) -> Any:
        row = connection.execute("SELECT clock_timestamp() AS now").fetchone()
        assert row is not None
        return row["now"]

    def cancel_as_owner(self, job: UUID) -> None:
        """Exactly the app's own UPDATE, in its user's role."""
        with self.connect() as connection, connection.transaction():
            connection.execute(
                "SELECT set_config('role', 'authenticated', true), set_config('request.jwt.claims', %s, true)",
                (json.dumps({"sub": str(self.user_id), "role": "authenticated"}),),
            )
            connection.execute(
                "UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = current_cost "
                "WHERE id = %s",
                (job,),
            )

    def row(self, job: UUID) -> dict[str, Any]:
        return self.select("SELECT * FROM training_jobs WHERE id = %s", job)[0]

    def wait_for(self, job: UUID, status: str, *, seconds: float = 30.0) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            row = self.row(job)
            if row["status"] == status:
                return row
            assert row["status"] not in FINAL, f"{row['status']}: {row['error_code']} {row['error_message']}"
            return None

        return eventually(reached, seconds=seconds, why=lambda: f"not {status}: {self.row(job)}")

    def events(self, job: UUID) -> list[dict[str, Any]]:
        return self.select("SELECT * FROM training_events WHERE job_id = %s ORDER BY id", job)

    def story(self, job: UUID) -> list[str]:
        return [event["kind"] for event in self.events(job)]

    def points(self, job: UUID) -> list[dict[str, Any]]:
        return self.select("SELECT * FROM metrics_points WHERE job_id = %s ORDER BY step", job)

    def leases(self) -> list[dict[str, Any]]:
        return self.select("SELECT * FROM training_leases")


def _rows(
    connection: psycopg.Connection[dict[str, Any]], statement: str, parameters: tuple[object, ...]
) -> list[dict[str, Any]]:
    cursor = connection.execute(statement, parameters)
    # Also of a SELECT without columns, whose description is empty.
    return cursor.fetchall() if cursor.description is not None else []


def write_model_folder(folder: Path) -> None:
    """A folder that looks complete to base-model resolution; the scripted trainer never loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
