"""Pushes an adapter to the hub, in a process that can be stopped, and says what to do where that fails."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any
from uuid import UUID

from daemon.errors import JobDelayed, JobError, JobFailed
from daemon.network.hub_process import hub_environment
from daemon.serving.hub_upload import Push
from daemon.serving_settings import EVERYBODY
from daemon.settings import Settings
from training.events import ErrorCode

# The hub's client limits each read and write, not their number. Enough for 8 GB over a slow line.
PUSH_SECONDS = 6 * 3600.0


def hub_token(settings: Settings, user_id: UUID) -> str | None:
    """Returns the token for jobs of this user: his own, else the one for everybody (`*`)."""
    tokens = dict(settings.hub_tokens)
    found = tokens.get(str(user_id)) or tokens.get(EVERYBODY)
    return None if found is None else found.get_secret_value()


async def push_adapter(push: Push) -> dict[str, Any]:
    """Uploads the folder and returns repository, url, commit, private and changed.

    Raises JobFailed for what another try does not mend, else JobDelayed. Cancelling ends the process."""
    return result_of(push, await _run(push))


def result_of(push: Push, answer: dict[str, Any]) -> dict[str, Any]:
    """Reads what the upload's process answered. Raises like `push_adapter`."""
    if answer.get("kind") != "pushed":
        raise _error(push, str(answer.get("why")), str(answer.get("message")))
    return {name: answer[name] for name in ("repository", "url", "commit", "private", "changed")}


async def _run(push: Push) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "daemon.serving.hub_upload",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=hub_environment(),
    )  # fmt: skip
    try:
        async with asyncio.timeout(PUSH_SECONDS):
            said, _ = await process.communicate(json.dumps(asdict(push)).encode() + b"\n")
    except TimeoutError:
        return {"why": "away", "message": f"the upload did not end within {PUSH_SECONDS / 3600:.0f} hours"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return dict(json.loads(said))
    except ValueError:
        return {"why": "away", "message": f"the upload ended early (exit status {process.returncode})"}


def _error(push: Push, why: str, message: str) -> JobError:
    failed = f"The adapter was not pushed to {push.repository}: {message}."
    match why:
        case "token":
            hint = "The token must be allowed to write there: check the owner's name, and the token's rights."
        case "occupied":
            hint = (
                f"Push to another repository, or run: brightrun-trainer push {push.job_id} {push.repository} --replace"
            )
        case "public":
            hint = (
                f"Make the repository private, or publish it on purpose: brightrun-trainer push {push.job_id} "
                f"{push.repository} --public"
            )
        case "offline":
            hint = f"Unset HF_HUB_OFFLINE, then push again: brightrun-trainer push {push.job_id} {push.repository}"
        case "refused":
            hint = (
                f"Correct what the hub names, then push again: brightrun-trainer push {push.job_id} {push.repository}"
            )
        case _:
            return JobDelayed(
                ErrorCode.UPLOAD_FAILED, failed, "It is tried again; the adapter itself is stored and complete."
            )
    return JobFailed(ErrorCode.UPLOAD_FAILED, failed, hint)
