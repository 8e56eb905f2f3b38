"""The doctor's check for an older dispatcher that still runs: where it may be scheduled, and what it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from daemon.database.connection import Database
from daemon.doctor.check_result import CheckResult, green, yellow

_NAME = "older dispatcher"
# What it leaves behind: false notifications that the database has dropped and noted in a job's story, and rows that it
# runs itself (epoch 0) and still changes.
_AT_WORK = """
    SELECT
        (
            SELECT max(event.at) FROM training_events AS event
            WHERE event.kind = 'notice' AND event.data ->> 'code' = 'older_dispatcher'
              AND event.at > clock_timestamp() - interval '2 days'
              -- There is no index for this: of a long history, the end.
              AND event.id > (SELECT coalesce(max(newest.id), 0) - 200000 FROM training_events AS newest)
        ) AS notified_at,
        (
            SELECT count(*) FROM training_jobs AS job
            WHERE job.status IN ('initializing', 'running') AND job.lease_epoch = 0
              AND job.updated_at > clock_timestamp() - interval '1 hour'
        ) AS moved
"""
_UNSEEN = {
    "unreadable": "pg_cron is installed and its jobs cannot be read",
    "own": "pg_cron is installed and shows only the jobs of the role that ran migrate",
}
_CURE = (
    "unschedule it (SELECT cron.unschedule('its name')), or delete the webhook: it would submit the same rows elsewhere"
)


async def check_older_dispatcher(database: Database) -> CheckResult:
    """Yellow where one is scheduled or at work, or where nobody can say. The database keeps it from doing harm."""
    found = (await database.fetch("SELECT training_find_dispatchers() AS found"))[0]["found"]
    at_work = (await database.fetch(_AT_WORK))[0]
    entries = [*found["scheduled"], *found["webhooks"]]
    suspects = _in_words(entry for entry in entries if entry["suspect"])
    others = _in_words(entry for entry in entries if not entry["suspect"])
    traces = _traces(at_work)
    if suspects:
        return yellow(_NAME, "; ".join([f"still scheduled: {suspects}", *traces]), _CURE)
    if traces:
        where = f"look at {others}" if others else "look in pg_cron, in database webhooks and in schedules elsewhere"
        return yellow(_NAME, "; ".join(traces), f"switch it off: {where}")
    if found["cron"] in _UNSEEN:
        return yellow(
            _NAME,
            _UNSEEN[found["cron"]],
            "look at SELECT jobname, command FROM cron.job as the administrator for one that dispatches training jobs",
        )
    if others:
        return green(_NAME, f"none found; these are on a schedule and look like something else: {others}")
    return green(
        _NAME, "no pg_cron here, and none at work" if found["cron"] == "none" else "none in pg_cron or at work"
    )


def _in_words(entries: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{entry['name']} ({', '.join([entry['schedule'], *('calls ' + name for name in entry['calls'])])})"
        for entry in entries
    )


def _traces(at_work: Mapping[str, Any]) -> list[str]:
    lines = []
    if at_work["notified_at"] is not None:
        lines.append(f"one was at work at {at_work['notified_at']:%Y-%m-%d %H:%M} UTC: it announced a job as its own")
    if at_work["moved"]:
        rows = (
            "1 row that one runs itself was"
            if at_work["moved"] == 1
            else f"{at_work['moved']} rows that one runs itself were"
        )
        lines.append(f"{rows} changed within the hour")
    return lines
