"""`brightrun-trainer push`: a completed job's adapter on the hub, with the caller's own token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from daemon.serving.hub_upload import MARKER
from tests.cli.command import CommandLine, Said
from tests.doubles.hub_uploads import HubUploads
from tests.lifecycle.queue import Queue

TOKEN = "hf_token-of-acme"


@pytest.fixture
def completed(queue: Queue) -> UUID:
    job = queue.insert()
    with queue.daemon(queue.folder):
        queue.wait_for(job, "completed")
    return job


@pytest.fixture
async def hub(cli: CommandLine) -> AsyncIterator[HubUploads]:
    async with HubUploads({TOKEN: ("acme",)}) as double:
        cli.environment["HF_ENDPOINT"] = double.url
        yield double


async def test_a_job_is_pushed_once_and_privately(
    cli: CommandLine, queue: Queue, completed: UUID, hub: HubUploads
) -> None:
    def push(*words: str, token: str = TOKEN) -> asyncio.Future[Said]:
        return asyncio.ensure_future(asyncio.to_thread(cli.run, "push", str(completed)[:8], *words, HF_TOKEN=token))

    said = await push("acme/support", "--json")
    assert said.status == 0, said
    repository = hub.repositories["acme/support"]
    marker = json.loads(repository.files[MARKER])
    assert (marker["job_id"], marker["adapter_sha256"]) == (str(completed), queue.row(completed)["adapter_sha256"])
    assert repository.private and "adapter_model.safetensors" in repository.files
    answer = said.lines[0]
    assert (answer["job_id"], answer["commit"]) == (str(completed), repository.commits[-1])
    again = await push("acme/support")
    assert "holds this adapter already" in again.out
    assert len(repository.commits) == 2

    refused = await push("globex/support")
    assert refused.status == 1 and "may not write to globex/support" in refused.err
    assert TOKEN not in refused.err
    assert "Name it OWNER/NAME" in (await push("support")).err
    assert "Set HF_TOKEN" in (await push("acme/support", token="")).err
    # Nothing tries a command again but the one who typed it.
    cli.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    away = await push("acme/support")
    assert away.status == 1 and "the hub cannot be reached" in away.err and "run this command again" in away.err
    assert "tried again" not in away.err
    offline = await asyncio.to_thread(
        cli.run, "push", str(completed)[:8], "acme/support", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1"
    )
    assert "Unset HF_HUB_OFFLINE" in offline.err
