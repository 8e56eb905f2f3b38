"""Downloads a base model from the hub, in a separate process that can be stopped."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

import structlog

from daemon.base_model.candidates import (
    Progress,
    ResolvedModel,
    _Candidate,
    _raise_if_incomplete,
    _resolved,
    checked_name,
)
from daemon.base_model.files import read_marker
from daemon.base_model.hub_download import Order, bytes_on_disk
from daemon.errors import HostFault, JobDelayed, JobError, JobFailed
from daemon.network.hub_process import hub_environment
from daemon.settings import Settings
from training.events import ErrorCode
from training.files.model_folder import faults_of_model
from training.files.published_form import TAKE_16_BITS

log = structlog.get_logger()


PROGRESS_SECONDS = 1.0


_downloads: dict[Path, asyncio.Lock] = {}


async def pull_model(
    name: str, settings: Settings, on_progress: Progress = lambda _done, _total: None
) -> ResolvedModel:
    """Downloads from the hub into TRAINER_MODELS_DIR/<org>/<name>, continuing what is there.

    Raises like `resolve_model`."""
    checked_name(name, settings)
    target = settings.models_dir / name
    async with _downloads.setdefault(target, asyncio.Lock()):
        # Another job may have downloaded the same model while we waited.
        if await asyncio.to_thread(_is_pulled, target, name):
            return _resolved(name, _Candidate(target, "models_dir"))
        log.info("model_download_started", model=name, target=str(target))
        answer = await _run_download(name, target, settings, on_progress)
        if answer.get("kind") != "done":
            raise _download_error(name, settings, str(answer.get("why")), str(answer.get("message")))
        _raise_if_incomplete(name, target, await asyncio.to_thread(faults_of_model, target))
        log.info("model_download_ended", model=name, revision=answer.get("revision"))
        return _resolved(name, _Candidate(target, "hub"))


def _is_pulled(target: Path, name: str) -> bool:
    marker = read_marker(target)
    return marker is not None and marker.complete and marker.model == name and not faults_of_model(target)


async def _run_download(name: str, target: Path, settings: Settings, on_progress: Progress) -> dict[str, object]:
    """Runs daemon.base_model.hub_download until it answers. Cancelling ends the process; what it downloaded stays."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "daemon.base_model.hub_download",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=hub_environment(),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    watching: asyncio.Task[None] | None = None
    answer: dict[str, object] = {}
    try:
        process.stdin.write(json.dumps(asdict(Order(name, str(target), token))).encode() + b"\n")
        await process.stdin.drain()
        async for line in process.stdout:
            answer = json.loads(line)
            if answer["kind"] == "plan":
                total = int(str(answer["total_bytes"]))
                log.info("model_download_planned", model=name, bytes=total, missing_bytes=answer["missing_bytes"])
                watching = asyncio.create_task(_watch(target, total, on_progress))
        await process.wait()
    finally:
        if watching is not None:
            watching.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
    if answer.get("kind") not in ("done", "failed"):
        message = f"the download of {name} ended early (exit status {process.returncode})"
        return {"kind": "failed", "why": "network", "message": message}
    return answer


async def _watch(target: Path, total: int, on_progress: Progress) -> None:
    while True:
        try:
            on_progress(min(await asyncio.to_thread(bytes_on_disk, target), total), total)
        except OSError as error:
            log.debug("model_download_not_measured", error=str(error))  # a file was moved to its final name meanwhile
        await asyncio.sleep(PROGRESS_SECONDS)


def _download_error(name: str, settings: Settings, why: str, message: str) -> JobError:
    match why:
        case "absent":
            return JobFailed(
                ErrorCode.MODEL_NOT_FOUND,
                message,
                "check base_model; for a private model the operator must set HF_TOKEN",
            )
        case "unusable":
            return JobFailed(ErrorCode.MODEL_UNSUPPORTED, message, "choose a model that is published as safetensors")
        case "quantised":
            return JobFailed(ErrorCode.MODEL_UNSUPPORTED, message, TAKE_16_BITS)
        case "disk":
            return HostFault(
                "models folder",
                ErrorCode.DISK_FULL,
                f"The models folder of the host has no room for {name}.",
                detail=f"{message}; free space under {settings.models_dir}, or set TRAINER_MODELS_DIR to a larger disk",
            )
        case _:
            hint = (
                "the next attempt continues the download; if it fails again, check that the host reaches huggingface.co"
            )
            return JobDelayed(ErrorCode.MODEL_NOT_FOUND, f"the model {name} could not be downloaded: {message}", hint)
