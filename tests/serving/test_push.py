"""Pushing adapters to the hub: real uploads by the hub's own client, against a double of the hub."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from daemon.errors import HostUnfit, JobDelayed, JobFailed
from daemon.read_settings import load_settings, secrets_of
from daemon.serving.hub_upload import MARKER, Push, upload
from daemon.serving.push import hub_token, push_adapter, result_of
from daemon.settings import Settings
from tests.doubles.hub_uploads import Fault, HubUploads

TOKEN = "hf_token-of-acme"
JOB = "11111111-2222-4333-8444-555555555555"
OTHER_JOB = "99999999-2222-4333-8444-555555555555"
FILES = {
    "adapter_model.safetensors": bytes(range(256)) * 10,
    "adapter_config.json": b'{"r": 8}',
    "README.md": b"---\nlicense: apache-2.0\n---\n# Adapter\n",
    "tokenizer/chat_template.jinja": b"{{ messages }}",
    "loss.png": b"\x89PNG",
    "manifest.json": b'{"hyperparameters": {"sample_prompts": ["private"]}}',
}

Order = Callable[..., Push]


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[HubUploads]:
    async with HubUploads({TOKEN: ("acme",)}) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        # The hub's client would read a token from there.
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield double


async def push(hub: HubUploads, order: Push) -> dict[str, Any]:
    """Like push_adapter, without a process of its own, whose start takes a second."""
    return result_of(order, asdict(await asyncio.to_thread(upload, order, hub.url)))


@pytest.fixture
def order(tmp_path: Path) -> Order:
    """An order to push an adapter folder; `files` changes the folder."""

    def make(repository: str = "acme/support", *, files: dict[str, bytes] | None = None, **changes: object) -> Push:
        folder = tmp_path / f"adapter-{len(list(tmp_path.glob('adapter-*')))}"
        for name, content in {**FILES, **(files or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        given = {"job_id": JOB, "adapter_sha256": "a" * 64, "token": TOKEN, **changes}
        return Push(repository, str(folder), **given)  # type: ignore[arg-type]

    return make


async def test_an_adapter_is_pushed_whole_in_one_commit_to_a_private_repository(hub: HubUploads, order: Order) -> None:
    result = await push_adapter(order())
    repository = hub.repositories["acme/support"]
    assert result == {
        "repository": "acme/support", "url": f"{hub.url}/acme/support", "commit": repository.commits[-1],
        "private": True, "changed": True,
    }  # fmt: skip
    assert repository.private and len(repository.commits) == 2
    held = {name: content for name, content in repository.files.items() if name not in (MARKER, ".gitattributes")}
    assert held == {name: content for name, content in FILES.items() if name != "manifest.json"}
    marker = json.loads(repository.files[MARKER])
    assert (marker["job_id"], marker["adapter_sha256"]) == (JOB, "a" * 64)
    assert hub.leaked == [], "the token went to the object store"
    assert TOKEN.encode() not in b"".join(repository.files.values())


async def test_the_same_adapter_again_makes_no_commit_and_sends_no_object(hub: HubUploads, order: Order) -> None:
    first = await push(hub, order())
    hub.steps.clear()
    again = await push(hub, order())
    assert (again["commit"], again["changed"]) == (first["commit"], False)
    assert "commit" not in hub.steps and "put" not in hub.steps


async def test_a_new_adapter_of_the_same_job_replaces_the_old_one_and_what_it_lacks(
    hub: HubUploads, order: Order
) -> None:
    await push(hub, order(files={"extra.json": b"{}"}))
    result = await push(hub, order(files={"adapter_model.safetensors": b"other"}, adapter_sha256="b" * 64))
    files = hub.repositories["acme/support"].files
    assert result["changed"] and files["adapter_model.safetensors"] == b"other"
    assert "extra.json" not in files


async def test_a_large_file_goes_in_parts(hub: HubUploads, order: Order) -> None:
    hub.part_bytes = 1000
    await push_adapter(order())
    assert hub.repositories["acme/support"].files["adapter_model.safetensors"] == FILES["adapter_model.safetensors"]
    assert hub.steps.count("put") == 4 and hub.leaked == []


async def test_another_jobs_adapter_is_replaced_only_on_demand(hub: HubUploads, order: Order) -> None:
    await push(hub, order())
    before = dict(hub.repositories["acme/support"].files)
    with pytest.raises(JobFailed, match=f"holds the adapter of job {JOB}") as refused:
        await push(hub, order(job_id=OTHER_JOB, files={"adapter_config.json": b"{}"}))
    assert f"push {OTHER_JOB} acme/support --replace" in (refused.value.hint or "")
    assert hub.repositories["acme/support"].files == before
    await push(hub, order(job_id=OTHER_JOB, replace=True))
    assert json.loads(hub.repositories["acme/support"].files[MARKER])["job_id"] == OTHER_JOB


async def test_a_repository_with_other_things_in_it_is_left_alone(hub: HubUploads, order: Order) -> None:
    hub.add("acme/model", **{"config.json": b"{}", "model.safetensors": b"base"})
    with pytest.raises(JobFailed, match="holds files that are not an adapter of ours") as refused:
        await push(hub, order("acme/model"))
    assert "config.json" not in str(refused.value), "what a private repository holds may be nobody's business"
    hub.add("acme/odd", **{MARKER: b"[]"})
    with pytest.raises(JobFailed, match="not an adapter of ours"):
        await push(hub, order("acme/odd"))
    hub.add("acme/empty")
    assert (await push(hub, order("acme/empty")))["changed"]


async def test_a_public_repository_is_filled_only_on_purpose(hub: HubUploads, order: Order) -> None:
    hub.add("acme/open", private=False)
    with pytest.raises(JobFailed, match="is public") as refused:
        await push(hub, order("acme/open"))
    assert "--public" in (refused.value.hint or "")
    assert (await push(hub, order("acme/open", public=True)))["private"] is False
    # Nor does asking for a public one publish what was private.
    hub.add("acme/closed")
    assert (await push(hub, order("acme/closed", public=True)))["private"] is True
    assert (await push(hub, order("acme/new", public=True)))["private"] is False


@pytest.mark.parametrize(
    ("repository", "token", "said"),
    [
        ("acme/support", "hf_wrong", "does not accept the token"),
        ("globex/support", TOKEN, "may not write to globex/support .*rights to create"),
        ("globex/open", TOKEN, "may not write to globex/open"),
    ],
)
async def test_a_token_without_the_right_is_said_to_be_one(
    hub: HubUploads, order: Order, repository: str, token: str, said: str
) -> None:
    hub.add("globex/open", private=False)
    with pytest.raises(JobFailed, match=said) as refused:
        await push(hub, order(repository, token=token, public=True))
    assert token not in str(refused.value) + str(refused.value.hint)


@pytest.mark.parametrize(
    ("step", "status", "passes"),
    [
        ("info", 500, True), ("create", 429, True), ("create", 503, True), ("commit", 500, True), ("commit", 409, True),
        ("commit", 412, True), ("commit", 413, False), ("create", 400, False), ("create", 402, False),
        ("info", 404, False),
    ],
)  # fmt: skip
async def test_what_may_pass_is_tried_again_and_nothing_else(
    hub: HubUploads, order: Order, step: str, status: int, passes: bool
) -> None:
    hub.faults[step] = [Fault(status, f"no, {TOKEN}")] * 9
    with pytest.raises(JobDelayed if passes else JobFailed) as raised:
        await push(hub, order())
    said = f"{raised.value.message} {raised.value.hint}"
    assert TOKEN not in said and "acme/support" in said
    hub.faults.clear()
    assert (await push(hub, order()))["changed"], "nothing that failed is in the way of the next try"


async def test_a_passing_fault_of_the_object_store_is_got_over(hub: HubUploads, order: Order) -> None:
    hub.faults["put"] = [Fault(503)]
    assert (await push(hub, order()))["changed"]


async def test_two_pushes_at_once_never_mix(hub: HubUploads, order: Order) -> None:
    """Somebody commits between our look at the repository and our commit."""
    hub.add("acme/support")
    hub.faults["commit"] = [Fault(412, "A commit has happened since.")]
    with pytest.raises(JobDelayed, match="HTTP 412"):
        await push(hub, order())


async def test_a_hub_that_cannot_be_reached_is_away(
    order: Order, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(JobDelayed):
        await push_adapter(order())


async def test_an_upload_without_an_end_is_ended_and_tried_again(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.serving.push.PUSH_SECONDS", 0.05)
    with pytest.raises(JobDelayed, match="did not end within"):
        await push_adapter(order())


def test_a_user_has_his_own_token_or_everybodys() -> None:
    one, other = UUID(int=1), UUID(int=2)
    settings = Settings(database_url="postgresql://u:p@h/d", hub_tokens=f"{one}=hf_one, *=hf_all")
    assert (hub_token(settings, one), hub_token(settings, other)) == ("hf_one", "hf_all")
    assert {"hf_one", "hf_all"} <= set(secrets_of(settings)), "no output may contain them"
    settings = Settings(database_url="postgresql://u:p@h/d", hub_tokens=f"{one}=hf_one")
    assert hub_token(settings, other) is None


@pytest.mark.parametrize("given", ["hf_secret", "hf_secret,*=hf_other", "bob=hf_secret", "*=hf_secret,*=hf_secret"])
def test_a_wrong_list_of_tokens_is_refused_without_quoting_it(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_HUB_TOKENS", given)
    with pytest.raises(HostUnfit, match="TRAINER_HUB_TOKENS") as refused:
        load_settings(database_url="postgresql://u:p@h/d")
    assert "secret" not in str(refused.value) and "other" not in str(refused.value)
