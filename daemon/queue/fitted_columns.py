"""Fits values to the columns of a job, for either job store."""

from __future__ import annotations

from typing import Any

from daemon.database.column_types import clamp_numeric, clean_text, fit_integer, fit_numeric
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import MetricPoint
from daemon.sentence import as_sentence, with_advice

MESSAGE_CHARACTERS = 8_000
_STACK_CHARACTERS = 60_000


def percent(progress: float) -> float:
    return min(max(fit_numeric(progress, 5, 2) or 0.0, 0.0), 100.0)


def adapter_columns(outcome: Completed) -> dict[str, Any]:
    return {
        "adapter_path": clean_text(outcome.adapter_path, 1_000),
        "adapter_sha256": clean_text(outcome.adapter_sha256, 100),
        "adapter_bytes": outcome.adapter_bytes,
    }


def error_columns(failed: Failed) -> dict[str, Any]:
    """`error_message` says what to do as well: the app's page shows that column alone."""
    return {
        "error_code": failed.code.value,
        "error_message": clean_text(with_advice(failed.message, failed.hint), MESSAGE_CHARACTERS),
        "error_hint": None if failed.hint is None else clean_text(as_sentence(failed.hint), MESSAGE_CHARACTERS),
        "error_stack": None if failed.stack is None else clean_text(failed.stack, _STACK_CHARACTERS),
    }


def point_row(point: MetricPoint, misfits: dict[str, str]) -> dict[str, Any] | None:
    """Fits a point to its columns; None when it has no loss to show. Adds what did not fit to `misfits`."""
    must = {"training_loss": (point.training_loss, 10, 6), "learning_rate": (point.learning_rate, 12, 10)}
    may = {
        "validation_loss": (point.validation_loss, 10, 6),
        "gradient_norm": (point.gradient_norm, 10, 6),
        "throughput": (point.throughput, 10, 2),
        "gpu_utilization": (point.gpu_utilization, 5, 2),
    }
    row: dict[str, Any] = {"step": fit_integer(point.step), "epoch": fit_integer(point.epoch)}
    row["at"] = None if point.at is None else point.at.isoformat()
    for name, (number, digits, scale) in must.items():
        clamped = clamp_numeric(number, digits, scale)
        if clamped is None or clamped != number:
            misfits.setdefault(name, repr(number))
        if clamped is None:
            return None
        row[name] = clamped
    for name, (value, digits, scale) in may.items():
        row[name] = fit_numeric(value, digits, scale)
        if row[name] is None and value is not None:
            misfits.setdefault(name, repr(value))
    return row
