"""Says in a line each what follows a completed job, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daemon.job_view.reads import JobRow
from daemon.sentence import with_advice
from daemon.terminal.format import size
from daemon.terminal.sanitize import plain


def delivery_facts(row: JobRow) -> list[tuple[str, str]]:
    """Returns each delivery's name with its state in words."""
    return [(plain(" ".join(filter(None, (each["kind"], each["target"])))), _words(each)) for each in row.deliveries]


def _words(delivery: Mapping[str, Any]) -> str:
    result = delivery.get("result") or {}
    error = delivery.get("error_message")
    match delivery["state"]:
        case "done":
            where = plain(result.get("path") or result.get("url") or result.get("model") or "done")
            return f"{where}, {size(result['bytes'])}" if isinstance(result.get("bytes"), int) else where
        case "failed":
            return f"failed: {plain(with_advice(error or 'it cannot be done.', delivery.get('error_hint')))}"
        case "running":
            return "a host works on it"
        case _:
            return _waits_for(delivery["kind"]) if error is None else f"is tried again: {plain(error)}"


def _waits_for(kind: str) -> str:
    """Names what a host must have, where none may have it: then it waits until one is started so."""
    needed = {"hub": "TRAINER_HUB_TOKENS", "endpoint": "TRAINER_ENDPOINT_URL"}.get(kind)
    return "waits for a host" if needed is None else f"waits for a host that has {needed}"
