"""The app's pages on their table pipeline_training_jobs: they insert, update, cancel and read, as user or server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from daemon.schema.sql_script import split_statements
from tests.paths import ROOT
from tests.postgres import AppDatabase, insert_statement

APP = ("sql/local/supabase.sql", "tests/app_schema.sql", "tests/app_pipeline_schema.sql")
TABLE = "pipeline_training_jobs"


def app_tables(database: AppDatabase, scripts: tuple[str, ...] = APP) -> None:
    """The app's own tables, as its migrations make them."""
    for script in scripts:
        for statement in split_statements((ROOT / script).read_text()):
            database.run(statement)


@dataclass
class Pipeline:
    database: AppDatabase
    user: UUID

    def as_user(self, user: UUID | None = None) -> AbstractContextManager[psycopg.Connection[dict[str, Any]]]:
        return self.database.acting("authenticated", user or self.user)

    def as_server(self) -> AbstractContextManager[psycopg.Connection[dict[str, Any]]]:
        return self.database.acting("service_role")

    def wish(self, **columns: Any) -> dict[str, Any]:
        """What the page sends."""
        return {
            "user_id": self.user,
            "job_name": "My training",
            "learning_rate": 0.0001,
            "batch_size": 4,
            "epochs": 3,
            "rank": 16,
            "alpha": 32,
            "dropout": 0.05,
            "dataset_name": "Conversations",
            "dataset_file_path": f"{self.user}/{uuid4()}.jsonl",
            "estimated_cost": 2.5,
            "status": "pending",
        } | columns

    def insert(self, *, server: bool = False, **columns: Any) -> UUID:
        """Inserts a row as its user, or as the app's server."""
        text, values = insert_statement(TABLE, self.wish(**columns))
        with self.as_server() if server else self.as_user() as app:
            made = app.execute(text.encode(), values).fetchone()
        assert made is not None
        return UUID(str(made["id"]))

    def update(self, row: UUID, changes: Mapping[str, Any], *, user: UUID | None = None, server: bool = False) -> int:
        """Updates a row as PostgREST does. Returns how many rows were found."""
        text = sql.SQL("UPDATE {} SET {} WHERE id = %(row)s").format(
            sql.Identifier(TABLE),
            sql.SQL(", ").join(
                sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in changes
            ),
        )
        with self.as_server() if server else self.as_user(user) as app:
            return app.execute(text, dict(changes) | {"row": row}).rowcount

    def cancel(self, row: UUID) -> int:
        return self.update(row, {"status": "cancelled"})

    def row(self, row: UUID) -> dict[str, Any]:
        return self.database.one(f"SELECT * FROM {TABLE} WHERE id = %s", (row,))

    def job(self, row: UUID) -> dict[str, Any]:
        return self.database.job(row)

    def metrics(self, row: UUID) -> list[dict[str, Any]]:
        return self.database.run(
            "SELECT * FROM pipeline_training_metrics WHERE job_id = %s ORDER BY step_number, metric_name", (row,)
        )
