"""One screen that says whether this host can work, and for each fault what to do.

Every check really does what the daemon will do: it listens, claims nothing, writes and deletes a file,
multiplies through a 4-bit layer. A check that cannot run says so; none is skipped in silence.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from daemon.child import child_environment
from daemon.database import Database
from daemon.errors import DatabaseAway, HostUnfit, JobError
from daemon.host import find_gpus, installed_versions
from daemon.listener import Listener
from daemon.migrate import pending
from daemon.models import resolve_model
from daemon.pod_end import keys_of
from daemon.pod_life import pod_environment
from daemon.runpod_api import RunPod, RunPodError
from daemon.settings import Settings
from daemon.storage import open_storage
from daemon.webhook import signing_keys

SELFCHECK_SECONDS = 120.0
HEARS_SECONDS = 15.0
PROBE_BYTES = 32 * 1024 * 1024
SLOW_DISK_MB_A_SECOND = 50.0
MIN_FREE_GIB = 10.0
MAX_SKEW_SECONDS = 5.0


class Light(StrEnum):
    GREEN = "ok"
    YELLOW = "warning"
    RED = "fault"


@dataclass(frozen=True)
class Finding:
    """One line of the screen. `advice` says what to do where the light is not green."""

    name: str
    light: Light
    detail: str
    advice: str | None = None


def green(name: str, detail: str) -> Finding:
    return Finding(name, Light.GREEN, detail)


def yellow(name: str, detail: str, advice: str) -> Finding:
    return Finding(name, Light.YELLOW, detail, advice)


def red(name: str, detail: str, advice: str) -> Finding:
    return Finding(name, Light.RED, detail, advice)


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """All findings, in the order of the screen, each as soon as it is known."""
    yield _check_python()
    yield _check_device(settings)
    async for finding in _check_trainer(settings):
        yield finding
    yield await _check_model(settings)
    for name, folder in (("work folder", settings.work_dir), ("models folder", settings.models_dir)):
        yield await asyncio.to_thread(_check_disk, name, folder)
    async for finding in _check_database(settings):
        yield finding
    yield await _check_storage(settings)
    yield _check_callbacks(settings)
    yield await _check_pod(settings)


def _check_python() -> Finding:
    versions = installed_versions()
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    missing = {"torch", "transformers", "peft", "trl", "bitsandbytes"} - versions.keys()
    if missing:
        return red("versions", f"not installed: {', '.join(sorted(missing))}", "pip install brightrun-trainer")
    return green("versions", shown)


def _check_device(settings: Settings) -> Finding:
    gpus = find_gpus()
    if gpus:
        return green("GPU", ", ".join(f"{gpu.name} {gpu.memory_gb:.1f} GiB" for gpu in gpus))
    if settings.device == "cpu":
        return green("GPU", "none, and TRAINER_DEVICE=cpu: small models train on the CPU")
    return red("GPU", "no NVIDIA GPU answers", "check the driver with nvidia-smi, or set TRAINER_DEVICE=cpu")


async def _check_trainer(settings: Settings) -> AsyncIterator[Finding]:
    device = "cuda" if settings.device != "cpu" and find_gpus() else "cpu"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "training.selfcheck",
        device,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(os.environ, (0,) if device == "cuda" else ()),
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), SELFCHECK_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        yield red("trainer", f"no answer in {SELFCHECK_SECONDS:.0f} s", "look for a hung driver: nvidia-smi, dmesg")
        return
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        yield red("trainer", last[0][:200], "the libraries do not fit together: install with constraints.txt")
        return
    found = json.loads(output)
    if found["nf4_error"] is None:
        yield green("4-bit layers", f"bitsandbytes {found['bitsandbytes']} computes on {device}")
    else:
        yield red("4-bit layers", found["nf4_error"], "this bitsandbytes build does not fit this CUDA: reinstall it")
    if device == "cpu":
        return
    if not found["cuda_available"]:
        yield red("CUDA", f"torch {found['torch']} sees no card", "install the torch build for this CUDA driver")
        return
    yield green("CUDA", f"{found['cuda']}, compute capability {found['capability']}")
    if not found["bf16"]:
        yield red("bf16", "this card does not compute in bf16", "use an Ampere card (A100, A10, RTX 30) or newer")
    for package, needed in (("flash_linear_attention", "flash-linear-attention"), ("causal_conv1d", "causal-conv1d")):
        if found[package]:
            yield green(needed, "installed")
        else:
            yield yellow(needed, "missing: Qwen3-Next trains many times slower", f"pip install {needed}")


async def _check_model(settings: Settings) -> Finding:
    offline = settings.model_copy(update={"model_downloads": False})
    try:
        model = await resolve_model(None, offline)
    except JobError as error:
        name = settings.default_model
        if settings.model_downloads and "model_not_found" in error.code:
            return yellow(
                "default model", f"{name} is not on this host", f"brightrun-trainer models pull {name} (large: hours)"
            )
        return red("default model", error.message, error.hint or f"brightrun-trainer models pull {name}")
    return green("default model", f"{model.name}, whole, in {model.path}")


def _check_disk(name: str, folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".doctor-{uuid4().hex}"
        begun = time.perf_counter()
        try:
            with probe.open("wb") as file:
                for _ in range(PROBE_BYTES // 2**20):
                    file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        variable = "TRAINER_WORK_DIR" if name.startswith("work") else "TRAINER_MODELS_DIR"
        return red(name, f"{folder}: {error.strerror}", f"mount the volume, or set {variable} to a writable folder")
    speed = PROBE_BYTES / 1e6 / (time.perf_counter() - begun)
    free = shutil.disk_usage(folder).free / 1024**3
    detail = f"{folder}: {free:.0f} GiB free, writes {speed:.0f} MB/s"
    if free < MIN_FREE_GIB:
        return red(name, detail, "free space on the volume, or enlarge it")
    if speed < SLOW_DISK_MB_A_SECOND:
        return yellow(name, detail, "slow: checkpoints and model loading will take long")
    return green(name, detail)


async def _check_database(settings: Settings) -> AsyncIterator[Finding]:
    dsn = settings.database_url.get_secret_value()
    begun = time.perf_counter()
    try:
        missing = await asyncio.to_thread(pending, dsn)
    except DatabaseAway as error:
        yield red("database", str(error), "check DATABASE_URL (host, port 5432, password) and the network")
        return
    yield green("database", f"answers in {(time.perf_counter() - begun) * 1000:.0f} ms")
    if missing:
        yield red("migrations", f"{len(missing)} not applied: {missing[0]} …", "brightrun-trainer migrate")
        return
    yield green("migrations", "current")
    try:
        async with Database(dsn, application_name="brightrun-trainer doctor") as database:
            yield await _check_role(database)
            yield await _check_clock(database)
            yield await _check_older_dispatcher(database)
    except (HostUnfit, DatabaseAway) as error:
        yield red("database role", str(error), "brightrun-trainer migrate, then see the operator's guide on roles")
        return
    yield await _check_listen(dsn)


async def _check_role(database: Database) -> Finding:
    rows = await database.fetch("SELECT current_user AS role, session_user AS login")
    if database.role_warning is not None:
        return yellow("database role", f"logs in as {rows[0]['login']}", database.role_warning)
    return green("database role", f"works as {rows[0]['role']}, logs in as {rows[0]['login']}")


async def _check_clock(database: Database) -> Finding:
    rows = await database.fetch("SELECT clock_timestamp() AS now")
    skew = abs((rows[0]["now"] - datetime.now(UTC)).total_seconds())
    if skew > MAX_SKEW_SECONDS:
        # Leases run on the database's clock; signatures of callbacks carry this host's.
        return yellow(
            "clock", f"{skew:.1f} s away from the database's", "synchronise it: receivers refuse old signatures"
        )
    return green("clock", f"{skew * 1000:.0f} ms from the database's")


async def _check_older_dispatcher(database: Database) -> Finding:
    found = await database.fetch("SELECT to_regclass('cron.job') IS NOT NULL AS has_cron")
    name = "older dispatcher"
    if not found[0]["has_cron"]:
        return green(name, "no pg_cron here")
    try:
        jobs = await database.fetch(
            "SELECT jobname FROM cron.job WHERE active AND (command ILIKE '%training%' OR jobname ILIKE '%training%')"
        )
    except HostUnfit:
        return yellow(name, "pg_cron is here and this role may not look", "see cron.job for the old dispatcher's job")
    if jobs:
        names = ", ".join(str(job["jobname"]) for job in jobs)
        return yellow(name, f"pg_cron still runs {names}", "unschedule it: it would submit the same rows elsewhere")
    return green(name, "pg_cron runs nothing about training")


async def _check_listen(dsn: str) -> Finding:
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


async def _check_storage(settings: Settings) -> Finding:
    """Write, read back and delete a real object, in the bucket that adapters go to."""
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
    except JobError as error:
        return red(name, error.message, error.hint or "check the key and the bucket")
    except OSError as error:
        return red(name, f"{probe.parent}: {error.strerror}", "set TRAINER_WORK_DIR to a writable folder")
    finally:
        probe.unlink(missing_ok=True)
        await storage.close()
    return green(name, f"wrote, read and deleted an object in {storage.bucket}")


def _check_callbacks(settings: Settings) -> Finding:
    try:
        keys = signing_keys(settings.callback_secrets)
    except HostUnfit as error:
        return red("callback secret", str(error), "echo whsec_$(openssl rand -base64 32)")
    if not keys:
        return yellow("callback secret", "none: callbacks are not signed", "set TRAINER_CALLBACK_SECRETS")
    return green("callback secret", f"{len(keys)} in use")


async def _check_pod(settings: Settings) -> Finding:
    """Whether this pod can see itself by the API, and so learn its price and end itself when idle."""
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


Show = Callable[[Finding], None]


def run_doctor(settings: Settings, show: Show) -> int:
    """Show each finding as it comes. Exit status: 1 when anything is red."""

    async def all_findings() -> int:
        worst = 0
        async for finding in examine(settings):
            show(finding)
            worst = max(worst, int(finding.light is Light.RED))
        return worst

    work: Coroutine[Any, Any, int] = all_findings()
    return asyncio.run(work)
