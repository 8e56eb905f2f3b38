"""Checks, column by column and before the first change, whether we can serve the app's tables as they are.

Otherwise the app's own inserts would fail later, or a job could neither end nor continue.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import class_row, dict_row

from daemon.queue.states import State
from daemon.schema.catalogue import Catalogue, Expected, read_catalogue
from training.events import Stage

_COLUMNS = (resources.files("sql.catalogue") / "read_columns.sql").read_bytes()
_CHECKS = (resources.files("sql.catalogue") / "read_checks.sql").read_bytes()
_TEXT = re.compile(r"(text)|character varying(?:\((\d+)\))?")
_NUMERIC = re.compile(r"numeric(?:\((\d+),(\d+)\))?")
_STATES = tuple(state.value for state in State)

# The app's columns that our statements, triggers and policies name. For text: the most characters that we write
# (0: the app writes it, any length). Columns that are not listed may be missing, or have any type.
_NAMED: Mapping[str, Mapping[str, int]] = {
    "training_jobs": {
        "id": 0, "user_id": 0, "dataset_id": 0, "preset_id": len("custom"), "hyperparameters": 0, "gpu_config": 0,
        "status": max(map(len, _STATES)), "current_stage": max(map(len, (*_STATES, *Stage))), "progress": 0,
        "current_epoch": 0, "total_epochs": 0, "current_step": 0, "total_steps": 0, "current_metrics": 0,
        "queued_at": 0, "started_at": 0, "completed_at": 0, "estimated_completion_at": 0, "current_cost": 0,
        "estimated_total_cost": 0, "final_cost": 0, "error_message": 8_000, "error_stack": 60_000, "retry_count": 0,
        "external_job_id": 0, "artifact_id": 0, "created_at": 0, "updated_at": 0,
    },
    "datasets": {
        "id": 0, "user_id": 0, "name": 200, "description": 2_000, "status": len("ready"),
        "storage_bucket": len("lora-datasets"), "storage_path": 300, "file_name": 200, "file_size": 0,
        "total_training_pairs": 0, "training_ready": 0, "validated_at": 0,
    },
    "metrics_points": {
        "id": 0, "job_id": 0, "timestamp": 0, "epoch": 0, "step": 0, "training_loss": 0, "validation_loss": 0,
        "learning_rate": 0, "gradient_norm": 0, "throughput": 0, "gpu_utilization": 0,
    },
    "model_artifacts": {
        "id": 0, "user_id": 0, "job_id": 0, "dataset_id": 0, "name": 200, "version": 0, "description": 60, "status": 0,
        "deployed_at": 0, "quality_metrics": 0, "training_summary": 0, "configuration": 0, "artifacts": 0,
        "updated_at": 0, "deleted_at": 0,
    },
    "cost_records": {
        "user_id": 0, "job_id": 0, "cost_type": len("training_compute"), "amount": 0, "details": 0, "billing_period": 0,
    },
    "notifications": {
        "user_id": 0, "type": len("artifact_ready"), "title": len("Your adapter is ready"), "message": 16_000,
        "priority": len("medium"), "read": 0, "action_url": 60, "metadata": 0,
    },
}  # fmt: skip
# Columns that are null at a job's insert or between two attempts.
_EMPTIED = frozenset({
    "current_metrics", "started_at", "completed_at", "estimated_completion_at", "final_cost", "error_message",
    "error_stack", "external_job_id", "artifact_id",
})  # fmt: skip
_UNIQUE = {"training_jobs": "id", "datasets": "id", "metrics_points": "id", "model_artifacts": "job_id"}
# Values that the app's CHECKs must accept: every status and stage; the smallest and largest of the numbers.
_WRITTEN: Mapping[tuple[str, str], Sequence[object]] = {
    ("training_jobs", "status"): _STATES,
    ("training_jobs", "current_stage"): ("queued", "completed", *(stage.value for stage in Stage)),
    ("training_jobs", "progress"): (0, 5, 50, 100),
    ("training_jobs", "current_epoch"): (0, 1, 100),
    ("training_jobs", "current_step"): (0, 1, 1_000_000),
    ("training_jobs", "total_steps"): (1, 1_000_000),
    ("training_jobs", "total_epochs"): (0, 1, 100),
    ("training_jobs", "current_cost"): (0, 0.01, 10_000),
    ("training_jobs", "final_cost"): (0, 0.01, 10_000),
    ("training_jobs", "estimated_total_cost"): (0, 0.01, 10_000),
    ("training_jobs", "retry_count"): (0, 1, 99),
    ("training_jobs", "preset_id"): ("custom",),
    ("training_jobs", "hyperparameters"): ("{}",),
    ("training_jobs", "gpu_config"): ("{}",),
    ("datasets", "status"): ("ready",),
    ("datasets", "storage_bucket"): ("url",),
    ("datasets", "file_size"): (0,),
}


@dataclass(frozen=True)
class _Column:
    relation: str
    relkind: str
    name: str
    type: str
    not_null: bool
    filled: bool
    generated: bool
    is_unique: bool

    def __str__(self) -> str:
        return f"{self.relation}.{self.name}"


def misfits(db: psycopg.Connection[Any], expected: Expected, *, fresh: bool) -> list[str]:
    """Lists what we cannot serve, one line per column with what to do. Empty if everything fits.

    `fresh`: none of our migrations was applied yet, so anything that has one of our names belongs to the app."""
    wanted = {name: text for (kind, name), text in (*expected.ours.items(), *expected.app.items()) if kind == "column"}
    relations = {name.partition(".")[0] for name in wanted}
    with db.cursor(row_factory=class_row(_Column)) as cursor:
        columns = cursor.execute(_COLUMNS, {"relations": sorted(relations)}).fetchall()
    lines = [*_wrong_relations(columns), *_missing(columns, wanted)]
    for column in columns:
        if column.name in _NAMED.get(column.relation, {}):
            lines += _wrong_of_the_app(column, _type_of(wanted[str(column)]))
    if fresh:
        lines += _taken_names(read_catalogue(db), wanted)
    return [*lines, *_refusing_checks(db)]


def _taken_names(found: Catalogue, wanted: Mapping[str, str]) -> Iterator[str]:
    """Names that we would create but that already exist as something else."""
    for relation in sorted({name.partition(".")[0] for name in wanted} - _NAMED.keys()):
        needed = {name: text for name, text in wanted.items() if name.startswith(f"{relation}.")}
        there = {name: text for (kind, name), text in found.items() if kind == "column" and name in needed}
        if ("table", relation) in found and there != needed:
            yield f"{relation} is a table of the app's own, and we need one of this name: rename yours"
    for name, definition in wanted.items():
        relation, _, column = name.partition(".")
        is_now = found.get(("column", name))
        if relation == "training_jobs" and column not in _NAMED[relation] and is_now not in (None, definition):
            yield f"{name} is a column of the app's own ({is_now}), and we need one of this name: rename yours"


def _type_of(definition: str) -> str:
    return re.split(" NOT NULL| identity| default ", definition)[0]


def _wrong_relations(columns: Sequence[_Column]) -> Iterator[str]:
    kinds = {"p": "partitioned", "v": "a view", "m": "a materialized view", "f": "a foreign table"}
    for relation, kind in sorted({(column.relation, column.relkind) for column in columns if column.relkind != "r"}):
        yield f"{relation} is {kinds[kind]}: it must be a plain table"


def _missing(columns: Sequence[_Column], wanted: Mapping[str, str]) -> Iterator[str]:
    there = {str(column) for column in columns}
    for relation in sorted({column.relation for column in columns} & _NAMED.keys()):
        for column in _NAMED[relation]:
            name = f"{relation}.{column}"
            if name not in there:
                yield f"{name} is missing: ALTER TABLE {relation} ADD COLUMN {column} {_type_of(wanted[name])}"


def _wrong_of_the_app(column: _Column, wanted: str) -> Iterator[str]:
    least = _NAMED[column.relation][column.name]
    alter = f"ALTER TABLE {column.relation} ALTER COLUMN {column.name}"
    if not _serves(column.type, wanted, least):
        if least and _TEXT.fullmatch(column.type) and _TEXT.fullmatch(wanted):
            room = "text" if least > 1_000 else wanted
            yield f"{column} is {column.type}, too short for {least} characters: {alter} TYPE {room}"
        else:
            yield f"{column} is {column.type}, not {wanted}: {alter} TYPE {wanted}"
    if column.generated:
        yield f"{column} is generated, and we write it: {alter} DROP EXPRESSION, or DROP IDENTITY"
    if column.relation == "training_jobs" and column.not_null and column.name in _EMPTIED:
        yield f"{column} is NOT NULL, and a job that waits has none: {alter} DROP NOT NULL"
    if _UNIQUE.get(column.relation) == column.name and not column.is_unique:
        yield f"{column} is not unique: ALTER TABLE {column.relation} ADD UNIQUE ({column.name})"


def _serves(found: str, wanted: str, least: int) -> bool:
    """Whether a column of type `found` can hold everything that we write to one of type `wanted`."""
    if text := _TEXT.fullmatch(found):
        return _TEXT.fullmatch(wanted) is not None and (text[2] is None or int(text[2]) >= least)
    if (number := _NUMERIC.fullmatch(found)) and (needed := _NUMERIC.fullmatch(wanted)):
        # Postgres rounds to fewer digits after the point, but refuses more digits before it than fit.
        return number[1] is None or int(number[1]) - int(number[2]) >= int(needed[1]) - int(needed[2])
    return found == wanted or (wanted, found) == ("integer", "bigint")


def _refusing_checks(db: psycopg.Connection[Any]) -> Iterator[str]:
    with db.cursor(row_factory=dict_row) as cursor:
        for check in cursor.execute(_CHECKS, {"relations": sorted(_NAMED)}).fetchall():
            values = _WRITTEN.get((check["relation"], check["column"]), ())
            refused = [value for value in values if _refuses(db, check, value)]
            if refused:
                words = ", ".join(map(str, refused))
                yield (
                    f"{check['relation']}.{check['column']}: the constraint {check['name']} does not allow {words}: "
                    f"ALTER TABLE {check['relation']} DROP CONSTRAINT {check['name']}, and add one that does"
                )


def _refuses(db: psycopg.Connection[Any], check: Mapping[str, Any], value: object) -> bool:
    question = sql.SQL(
        "SELECT ({condition}) IS FALSE FROM (SELECT {value}::text::{type} AS {column}) AS written"
    ).format(
        condition=sql.SQL(check["condition"]),
        value=sql.Literal(str(value)),
        type=sql.SQL(check["type"]),
        column=sql.Identifier(check["column"]),
    )
    try:
        with db.transaction(force_rollback=True):
            answer = db.execute(question).fetchone()
    except psycopg.DatabaseError:
        return False  # the type cannot hold the value: reported for the column itself
    return answer is not None and bool(answer[0])
