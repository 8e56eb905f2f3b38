"""Ends the pod that we run in, by the first way that works. If none works, it logs a critical event.

First the API v2 with the pod's own key, which may lack the right, and then with ours; then the runpod package, which
uses the older API; then the runpodctl in RunPod's images. An idle GPU that keeps running costs money.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import structlog

from daemon.pod.runpod_api import API, ApiFault, Key, PodAction, RunPod, RunPodError

log = structlog.get_logger()

API_TRIES = 3
API_PAUSE_SECONDS = 2.0
_COMMAND_SECONDS = 20.0
# Commands of the older and the newer runpodctl: the image may have either.
_COMMANDS: Mapping[PodAction, tuple[tuple[str, ...], ...]] = {
    "stop": (("stop", "pod"), ("pod", "stop")),
    "terminate": (("remove", "pod"), ("pod", "delete")),
}


def keys_of(environment: Mapping[str, str]) -> list[Key]:
    """The API keys to try. RunPod gives every pod a key of its own, which comes first."""
    names = ("RUNPOD_API_KEY", "TRAINER_RUNPOD_API_KEY")
    return [Key(name, environment[name]) for name in names if environment.get(name)]


def chosen_end(environment: Mapping[str, str]) -> PodAction:
    """TRAINER_POD_END; else terminate if everything important is on a network volume, stop if it would be lost."""
    match environment.get("TRAINER_POD_END", "").strip().lower():
        case "terminate":
            return "terminate"
        case "stop":
            return "stop"
        case _:
            return "terminate" if environment.get("RUNPOD_VOLUME_ID") else "stop"


async def end_own_pod(pod_id: str, action: PodAction, environment: Mapping[str, str]) -> bool:
    """Ends this pod. False if no way worked; each failed way is logged."""
    keys = keys_of(environment)
    api = environment.get("TRAINER_RUNPOD_API") or API
    ended_by = (
        await _by_api(pod_id, action, keys, api)
        or await asyncio.to_thread(_by_package, pod_id, action, keys)
        or await asyncio.to_thread(_by_command, pod_id, action, environment)
    )
    if ended_by is None:
        log.critical(
            "pod_idle_and_billing",
            pod_id=pod_id,
            advice="no way to end this pod worked: end it by hand, and set TRAINER_RUNPOD_API_KEY",
        )
        return False
    log.warning("pod_stopped" if action == "stop" else "pod_terminated", way=ended_by, pod_id=pod_id)
    return True


async def _by_api(pod_id: str, action: PodAction, keys: Sequence[Key], api: str) -> str | None:
    async with RunPod(keys, api=api) as runpod:
        for attempt in range(1, API_TRIES + 1):
            try:
                await runpod.end_pod(pod_id, action)
            except RunPodError as error:
                log.error("pod_end_failed", way="api", status=error.status, fault=error.fault, error=str(error))
                if error.fault is not ApiFault.AWAY or attempt == API_TRIES:
                    return None
                await asyncio.sleep(min(max(error.wait_seconds, API_PAUSE_SECONDS * attempt), 30.0))
            else:
                return "api"
    return None


def _by_package(pod_id: str, action: PodAction, keys: Sequence[Key]) -> str | None:
    if not keys:
        return None
    # The import takes seconds and tens of megabytes, so it is here and nowhere else.
    import runpod

    for key in keys:
        runpod.api_key = key.value
        try:
            (runpod.stop_pod if action == "stop" else runpod.terminate_pod)(pod_id)
        # Errors of the package, of its HTTP client, and of responses that have an unexpected shape.
        except (runpod.error.RunPodError, OSError, LookupError, TypeError, ValueError) as error:
            log.error("pod_end_failed", way="package", key=key.name, error=f"{type(error).__name__}: {error}"[:300])
        else:
            return "package"
    return None


def _by_command(pod_id: str, action: PodAction, environment: Mapping[str, str]) -> str | None:
    command = shutil.which("runpodctl", path=environment.get("PATH", os.defpath))
    if command is None:
        log.error("pod_end_failed", way="runpodctl", error="not installed")
        return None
    for words in _COMMANDS[action]:
        try:
            done = subprocess.run(
                [command, *words, pod_id],
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
                check=False,
                env=dict(environment),
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            log.error("pod_end_failed", way="runpodctl", error=type(error).__name__)
            return None
        if done.returncode == 0:
            return "runpodctl"
        log.error("pod_end_failed", way="runpodctl", status=done.returncode, error=done.stderr[-300:])
    return None
