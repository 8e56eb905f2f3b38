"""Prometheus metrics of the whole service, from one cheap query per scrape.

Gauges show the current rows. Counters and the pick-up histogram follow the jobs' events from the moment
this process began to read them; Prometheus handles counters that restart at zero.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Protocol

import structlog
from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from daemon.errors import DatabaseAway

log = structlog.get_logger()

__all__ = ["CONTENT_TYPE", "ServiceMetrics"]

# Scrapes, probes and health checks within a second share one answer.
FRESH_SECONDS = 1.0
# From milliseconds for an idle daemon to a queue that waits for a pod to start.
PICKUP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 1800, 7200)

_GAUGES: Mapping[str, str] = {
    "due": "Jobs that could be claimed now (counted up to 100,000).",
    "scheduled": "Jobs that wait for a time: scheduled ones and retries.",
    "oldest_wait_seconds": "How long the oldest job that could be claimed has waited.",
    "initializing": "Jobs claimed, before their first optimizer step.",
    "running": "Jobs in training.",
    "lost": "Jobs whose lease has expired and was not reaped yet.",
    "heartbeat_age_seconds": "Age of the oldest heartbeat among the leases.",
    "tokens_per_second": "Training throughput of all running jobs together.",
    "outbox": "Callbacks not delivered yet.",
    "outbox_age_seconds": "Age of the oldest callback not delivered yet.",
    "troubles": "What living hosts report as not working: a full disk, a task that fails.",
}


class Reader(Protocol):
    """Runs a statement of sql/queries."""

    async def fetch(self, name: str, parameters: Mapping[str, Any], /) -> list[dict[str, Any]]: ...


class ServiceMetrics:
    """The metrics. Queries the database at most once a second, however often it is called."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._turn = asyncio.Lock()
        self._asked_at = float("-inf")
        self._cursor: int | None = None
        self._registry = CollectorRegistry()
        self._up = Gauge("trainer_database_up", "1 while the database answers.", registry=self._registry)
        self._gauges = {
            name: Gauge(f"trainer_{_in_prometheus_words(name)}", text, registry=self._registry)
            for name, text in _GAUGES.items()
        }
        self._workers = Gauge(
            "trainer_workers", "Live hosts by state: idle, busy, out_of_service.", ["state"], registry=self._registry
        )
        self._endings = Counter(
            "trainer_attempts_ended",
            "Attempts by ending: completed, failed, cancelled, retrying, reaped, released.",
            ["ending"],
            registry=self._registry,
        )
        self._failures = Counter(
            "trainer_failures", "Attempts that failed, by code: the error_code.", ["code"], registry=self._registry
        )
        self._chore_failures = Counter(
            "trainer_chore_failures",
            "Failures of the gateway's background work, by name; each was begun again.",
            ["chore"],
            registry=self._registry,
        )
        self._pickups = Histogram(
            "trainer_pickup_seconds",
            "From the moment that a job could be claimed to its claim.",
            buckets=PICKUP_BUCKETS,
            registry=self._registry,
        )
        self.totals: dict[str, int] = dict.fromkeys(
            ("completed", "failed", "cancelled", "retrying", "reaped", "released"), 0
        )
        self.now: dict[str, Any] = {}

    def count_chore_failure(self, name: str) -> None:
        """Counts a failure of a background task of this process, which is restarted."""
        self._chore_failures.labels(name).inc()

    async def exposition(self) -> bytes:
        """Returns the text that Prometheus scrapes. While the database is away, trainer_database_up is 0."""
        try:
            await self.refresh()
        except DatabaseAway as error:
            log.debug("metrics_without_database", error=str(error))
        return generate_latest(self._registry)

    async def refresh(self) -> None:
        """Updates everything unless that was done within the last second. Raises DatabaseAway."""
        async with self._turn:
            if time.monotonic() - self._asked_at < FRESH_SECONDS:
                return
            try:
                row = (await self._reader.fetch("read_service_metrics", {"after_id": self._cursor}))[0]
            except DatabaseAway:
                self._up.set(0)
                raise
            self._asked_at = time.monotonic()
            self._up.set(1)
            self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        self.now, self._cursor = row, row["cursor"]
        for name, gauge in self._gauges.items():
            gauge.set(row[name] or 0)
        for state in ("idle", "busy", "out_of_service"):
            self._workers.labels(state).set(row["workers"].get(state, 0))
        for ending in row["endings"]:
            self._endings.labels(ending["kind"]).inc(ending["jobs"])
            self.totals[ending["kind"]] += ending["jobs"]
            if ending["code"]:
                self._failures.labels(ending["code"]).inc(ending["jobs"])
        for seconds in row["pickups"]:
            self._pickups.observe(max(seconds, 0.0))


def _in_prometheus_words(name: str) -> str:
    return {
        "due": "jobs_due",
        "scheduled": "jobs_scheduled",
        "initializing": "jobs_initializing",
        "running": "jobs_running",
        "lost": "jobs_lost",
        "outbox": "callbacks_pending",
        "outbox_age_seconds": "callbacks_oldest_seconds",
    }.get(name, name)
