"""The doctor's checks beyond this machine: the database, the storage, callbacks, RunPod."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from psycopg.conninfo import conninfo_to_dict

from daemon.database.connection import Database
from daemon.database.listener import Listener
from daemon.doctor.check_result import CheckResult, green, red, yellow
from daemon.doctor.dispatcher_check import check_older_dispatcher
from daemon.errors import DatabaseAway, HostFault, HostUnfit, JobError, JobFailed
from daemon.fitness import ADVICE
from daemon.pod.lifetime import pod_environment
from daemon.pod.runpod_api import RunPod, RunPodError
from daemon.pod.shutdown import keys_of
from daemon.queue.row_visibility import RowVisibility, cure, in_words
from daemon.read_settings import notices_of
from daemon.report.webhook import signing_keys
from daemon.schema.fronts import read_fronts
from daemon.schema.migrations import MayNotRead, faults, pending
from daemon.settings import Settings
from daemon.storage.open import open_storage
from daemon.storage.tus import unfinished_uploads

HEARS_SECONDS = 15.0
# A rank 64 adapter of the default 80B model. Most jobs stay below it; the 50 MB limit of some free plans is too small.
LARGE_ADAPTER_BYTES = 500_000_000
RIGHTS = {
    "training_jobs": ("SELECT", "UPDATE"),
    "training_leases": ("SELECT", "INSERT", "UPDATE"),
    "training_workers": ("SELECT", "INSERT", "UPDATE"),
    "training_events": ("SELECT", "INSERT"),
    "training_callbacks": ("SELECT", "INSERT", "UPDATE"),
    "training_deliveries": ("SELECT", "INSERT", "UPDATE"),
    "metrics_points": ("INSERT",),
    "model_artifacts": ("INSERT",),
    "cost_records": ("INSERT",),
    "notifications": ("INSERT",),
    "datasets": ("SELECT",),
}
MAX_SKEW_SECONDS = 5.0
# Supabase keeps the address of a resumable upload for a day.
FORGOTTEN_HOURS = 24.0
_NOT_YET = "role, rights, clock and LISTEN come after it"


async def check_database(settings: Settings) -> AsyncIterator[CheckResult]:
    dsn = settings.database_url.get_secret_value()
    for notice in notices_of(settings):
        yield yellow("DATABASE_URL", notice, "remove it from the address")
    begun = time.perf_counter()
    unread: str | None = None
    missing: list[str] = []
    try:
        missing = await asyncio.to_thread(pending, dsn)
    except MayNotRead as error:
        unread = str(error)
    except (DatabaseAway, HostUnfit) as error:
        yield red(
            "database",
            str(error),
            f"check DATABASE_URL (host, port 5432, password) and the network; {_NOT_YET}",
        )
        return
    yield green("database", f"answers in {(time.perf_counter() - begun) * 1000:.0f} ms, {_kind_of_connection(dsn)}")
    if unread is not None:
        yield yellow(
            "migrations", unread, "run `brightrun-trainer migrate` as the administrator, which grants the right as well"
        )
    elif missing:
        yield red(
            "migrations", f"{len(missing)} not applied: {missing[0]} …", f"run `brightrun-trainer migrate`; {_NOT_YET}"
        )
        return
    else:
        yield green("migrations", "current")
    try:
        async with Database(dsn, application_name="brightrun-trainer doctor") as database:
            yield await _check_role(database)
            yield await _check_rights(database)
            yield await asyncio.to_thread(_check_installation, dsn)
            async for finding in _check_fronts(database):
                yield finding
            yield await _check_sight(RowVisibility(database))
            yield await _check_clock(database)
            yield await check_older_dispatcher(database)
            async for finding in _check_hosts(database):
                yield finding
    except (HostUnfit, DatabaseAway) as error:
        yield red(
            "database role", str(error), "run `brightrun-trainer migrate`, then see the operator's guide on roles"
        )
        return
    yield await _check_listen(dsn)


async def _check_role(database: Database) -> CheckResult:
    rows = await database.fetch("SELECT current_user AS role, session_user AS login")
    if database.role_warning is not None:
        return yellow("database role", f"logs in as {rows[0]['login']}", database.role_warning)
    return green("database role", f"works as {rows[0]['role']}, logs in as {rows[0]['login']}")


def _kind_of_connection(dsn: str) -> str:
    """The kind of connection according to Supabase's URL. Another line checks whether notifications arrive."""
    given = conninfo_to_dict(dsn)
    host, port = str(given.get("host") or "local socket"), str(given.get("port") or "5432")
    if port == "6543":
        return f"by the transaction pooler {host}:{port}"
    return f"by the session pooler {host}:{port}" if ".pooler." in host else f"directly at {host}:{port}"


async def _check_rights(database: Database) -> CheckResult:
    """Checks that the daemon's role has the rights that its statements need."""
    rows = await database.fetch(
        "SELECT relation, verb FROM (VALUES "
        + ", ".join(f"('public.{relation}', '{verb}')" for relation, verbs in RIGHTS.items() for verb in verbs)
        + ") AS needed (relation, verb) WHERE NOT has_any_column_privilege(relation, verb) "
        "UNION ALL SELECT relation, verb FROM (VALUES ('public.training_leases', 'DELETE')) AS needed (relation, verb) "
        "WHERE NOT has_table_privilege(relation, verb)"
    )
    if rows:
        missing = ", ".join(f"{row['verb']} on {row['relation'].removeprefix('public.')}" for row in rows)
        return red("rights", f"lacks {missing}", "run `brightrun-trainer migrate` as the administrator")
    return green("rights", f"all that the daemon needs on {len(RIGHTS)} tables")


def _check_installation(dsn: str) -> CheckResult:
    """Checks that everything is as `migrate` left it: after a restore, the record of migrations alone is not enough."""
    name, advice = "installation", "run `brightrun-trainer migrate` as the administrator, which repairs it"
    try:
        wrong = faults(dsn)
    except MayNotRead as error:
        return yellow(name, str(error), advice)
    if wrong is None:
        return yellow(name, "not verified on this server yet", "run `brightrun-trainer migrate` as the administrator")
    if wrong:
        return red(name, "; ".join(wrong), advice)
    return green(name, "every role, right, trigger and function is as migrate left it")


async def _check_fronts(database: Database) -> AsyncIterator[CheckResult]:
    """Checks the other tables of the app that feed the queue, and finds one that could and does not."""
    for state in await read_fronts(database):
        name, table = f"front {state.front.name}", state.front.tables[0]
        install = f"`brightrun-trainer migrate --front {state.front.name}`"
        if not state.installed:
            if state.has_table:
                yield yellow(
                    name,
                    f"the app has the table {table}, and rows inserted there start no job here",
                    f"if the app's pages use it, run {install}",
                )
        elif state.faults:
            yield red(name, "; ".join(state.faults), f"mend the app's table, then run {install}")
        elif state.lags:
            yield yellow(
                name,
                f"{state.lags} rows of {table} do not show yet what became of their jobs",
                f"see the reason in training_front_lags; `SELECT sync_{state.front.name}_jobs()` writes them again",
            )
        else:
            yield green(name, f"{table} is a front of the queue, trained on {state.base_model or 'the default model'}")


async def _check_sight(visibility: RowVisibility) -> CheckResult:
    """Checks for policies of the app that silently hide rows from the daemon's role: jobs would wait for ever."""
    name = "row security"
    sight, policies = await visibility.read_row_visibility(), await visibility.read_hiding_policies()
    cures = "; ".join(cure(policy) for policy in policies)
    if hidden := in_words(sight, policies):
        return red(name, hidden, cures or "see pg_policies for what hides them")
    if policies:
        named = ", ".join(f"{policy.policy or 'no policy'} on {policy.relation}" for policy in policies)
        return yellow(name, f"hides nothing now, and could: {named}", cures)
    return green(name, "hides nothing from the daemon")


async def _check_clock(database: Database) -> CheckResult:
    rows = await database.fetch("SELECT clock_timestamp() AS now")
    skew = abs((rows[0]["now"] - datetime.now(UTC)).total_seconds())
    if skew > MAX_SKEW_SECONDS:
        # Leases use the database's clock, but callback signatures use this host's.
        return yellow(
            "clock",
            f"the clock is {skew:.1f} s away from the database's",
            "synchronise it: receivers refuse old signatures",
        )
    return green("clock", f"{skew * 1000:.0f} ms from the database's")


async def _check_hosts(database: Database) -> AsyncIterator[CheckResult]:
    """Reports what the live daemons say about themselves."""
    rows = await database.fetch(
        "SELECT host, state, coalesce(data -> 'troubles', '[]') AS troubles FROM training_workers "
        "WHERE state NOT IN ('gone') AND last_seen_at > clock_timestamp() - interval '2 minutes' ORDER BY started_at"
    )
    told = 0
    for row in rows:
        for trouble in row["troubles"]:
            told += 1
            name, since = trouble.get("name", "trouble"), str(trouble.get("since", ""))[:19]
            state = "claims nothing" if row["state"] == "out_of_service" else row["state"]
            what, _, advice = str(trouble.get("message", "")).partition(". ")
            yield red(f"host {row['host']}", f"{state}; {name} since {since}: {what}", advice or "see the host's log")
    if not told:
        yield green("hosts", f"{len(rows)} alive, none reports a trouble")


async def _check_listen(dsn: str) -> CheckResult:
    listener = Listener(dsn, wake=lambda: None, on_cancel=lambda _job: None)
    task = asyncio.create_task(listener.run())
    try:
        await asyncio.wait_for(listener.hears.wait(), HEARS_SECONDS)
    except TimeoutError:
        return red(
            "LISTEN",
            "notifications do not arrive",
            "this looks like a transaction pooler (port 6543): use the session pooler (5432) in DATABASE_URL",
        )
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return green("LISTEN", "a notification from another session arrived")


async def check_storage(settings: Settings) -> CheckResult:
    """Writes, reads back and deletes a real object in the bucket for adapters."""
    name = f"storage ({settings.effective_storage})"
    storage = open_storage(settings)
    probe = Path(settings.work_dir) / f".doctor-{uuid4().hex}"
    object_path = f"doctor/{probe.name.removeprefix('.')}.txt"
    content = b"brightrun-trainer doctor\n"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(content)
        await storage.check(len(content))
        await storage.upload(probe, object_path, sha256=sha256(content).hexdigest(), resume_dir=probe.parent)
        await storage.delete(object_path)
        try:
            doubt = await storage.check(LARGE_ADAPTER_BYTES)
        except JobFailed as error:
            return yellow(name, f"works, but not for large adapters: {error.message}", error.hint or "raise the limit")
        if doubt is not None:
            return yellow(name, f"works for small files; {doubt}", "check the status of the storage, and try again")
    except HostFault as fault:
        return red(name, fault.for_the_operator, ADVICE[fault.part])
    except JobError as error:
        return red(name, error.for_the_operator, error.hint or "check the key and the bucket")
    except OSError as error:
        return red(name, f"{probe.parent}: {error.strerror}", "set TRAINER_WORK_DIR to a writable folder")
    finally:
        if probe.parent.is_dir():
            probe.unlink(missing_ok=True)
        await storage.close()
    return green(name, f"wrote, read and deleted an object in {storage.bucket}")


def check_unfinished_uploads(settings: Settings) -> CheckResult:
    """Lists the uploads that were begun from this host's work folder and are not whole yet."""
    name, now = "unfinished uploads", time.time()
    try:
        found = [
            (upload, (now - file.stat().st_mtime) / 3600.0) for file, upload in unfinished_uploads(settings.work_dir)
        ]
    except OSError as error:
        return yellow(name, f"{settings.work_dir}: {error.strerror}", "set TRAINER_WORK_DIR to a readable folder")
    if not found:
        return green(name, "none")
    listed = "; ".join(f"{upload.object_name}, {upload.bytes:,} bytes, {hours:.1f} h old" for upload, hours in found)
    if max(hours for _, hours in found) > FORGOTTEN_HOURS:
        return yellow(name, listed, "the server has forgotten those of more than a day; the clean-up removes the rest")
    return green(name, listed)


def check_callbacks(settings: Settings) -> CheckResult:
    try:
        keys = signing_keys(settings.callback_secrets)
    except HostUnfit as error:
        fault = str(error).partition("; make one")[0]
        return red("callback secret", fault, "make one with `echo whsec_$(openssl rand -base64 32)`")
    if not keys:
        advice = "set TRAINER_CALLBACK_SECRETS: echo whsec_$(openssl rand -base64 32)"
        return yellow("callback secret", "there is none, so callbacks are not signed", advice)
    return green("callback secret", f"{len(keys)} in use")


async def check_pod(settings: Settings) -> CheckResult:
    """Checks that this pod can read itself from the API, so that it knows its price and can end itself when idle."""
    if settings.pod_id is None:
        return green("RunPod", "not a pod")
    advice = "set TRAINER_RUNPOD_API_KEY to a key that may read and end pods: else an idle pod may go on billing"
    async with RunPod(keys_of(pod_environment(settings)), api=settings.runpod_api) as runpod:
        try:
            pod = await runpod.read_pod(settings.pod_id)
        except RunPodError as error:
            return yellow("RunPod", f"pod {settings.pod_id}: {error}", advice)
    price = "at an unknown price" if pod.cost_per_hour is None else f"{pod.cost_per_hour:.2f} US dollars an hour"
    if settings.idle_minutes is None:
        return yellow("RunPod", f"pod {pod.id}, {price}, never ends itself", "set TRAINER_IDLE_MINUTES")
    return green("RunPod", f"pod {pod.id}, {price}, ends itself after {settings.idle_minutes:g} idle minutes")
