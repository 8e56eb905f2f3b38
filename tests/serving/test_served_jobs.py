"""Jobs of a real daemon, delivered to the hub and to an endpoint: what their rows say, and what stays secret."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from uuid import UUID

import pytest

from tests.daemon_process import DaemonProcess, eventually
from tests.doubles.endpoint import EndpointDouble, Loaded
from tests.doubles.hub_uploads import HubUploads
from tests.lifecycle.queue import Queue

TOKEN, KEY = "hf_token-of-the-owner", "endpoint-key-of-the-operator"
T = TypeVar("T")


@pytest.fixture
async def hub() -> AsyncIterator[HubUploads]:
    async with HubUploads({TOKEN: ("acme",)}) as double:
        yield double


@pytest.fixture
async def endpoint() -> AsyncIterator[EndpointDouble]:
    async with EndpointDouble("tiny", key=KEY) as double:
        yield double


def host(queue: Queue, hub: HubUploads, endpoint: EndpointDouble, **settings: object) -> DaemonProcess:
    given = {
        "hub_tokens": f"{queue.user_id}={TOKEN}",
        "endpoint_url": endpoint.url,
        "endpoint_key": KEY,
        "endpoint_dir": queue.folder / "shared",
        "endpoint_seconds": 5,
    }
    daemon = queue.daemon(queue.folder, **given | settings)
    daemon.environment["HF_ENDPOINT"] = hub.url
    return daemon


def delivered(queue: Queue, job: UUID, kind: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        rows = queue.select("SELECT * FROM training_deliveries WHERE job_id = %s AND kind = %s", job, kind)
        return rows[0] if rows and rows[0]["state"] in ("done", "failed") else None

    return eventually(over, seconds=40, why=lambda: f"not delivered: {queue.events(job)[-1]}")


async def beside(work: Callable[[], T]) -> T:
    """Runs what waits for a daemon in a thread: the doubles answer meanwhile."""
    return await asyncio.to_thread(work)


def everything(queue: Queue) -> str:
    """All that the database holds of jobs, and all that daemon and trainer have logged."""
    tables = ("training_jobs", "training_deliveries", "training_events", "training_callbacks", "model_artifacts")
    rows = [str(queue.select(f"SELECT * FROM {table}")) for table in tables]
    files = [path for path in queue.folder.rglob("*") if path.is_file() and path.suffix in (".log", ".json", ".jsonl")]
    return "".join([*rows, *(path.read_text(errors="replace") for path in files)])


async def test_a_job_is_pushed_served_named_and_superseded(
    queue: Queue, hub: HubUploads, endpoint: EndpointDouble
) -> None:
    asked = {"base_model": "tiny", "push_to_hub": "acme/support", "deploy": "support", "sample_prompts": ["Who?"]}

    def work() -> tuple[UUID, UUID]:
        with host(queue, hub, endpoint):
            first = queue.insert(
                hyperparameters=asked, script=[["environment", str(queue.folder / "environment.json")]]
            )
            assert delivered(queue, first, "hub")["result"]["repository"] == "acme/support"
            done = delivered(queue, first, "endpoint")
            assert done["state"] == "done", done
            row = queue.row(first)
            assert row["deployed_at"] is not None
            assert (row["deployed_as"], row["deployment_note"]) == ("support", None)
            second = queue.insert(hyperparameters=asked | {"push_to_hub": "acme/newer"})
            delivered(queue, second, "endpoint")
            delivered(queue, second, "hub")
        return first, second

    first, second = await beside(work)
    assert set(endpoint.adapters) == {"support", str(second)}
    assert queue.row(second)["deployed_as"] == "support"
    old = queue.row(first)
    assert (old["deployed_at"], old["deployment_note"]) == (None, f"Superseded by job {second}.")
    statuses = queue.select("SELECT job_id, status, deployed_at FROM model_artifacts")
    assert {row["job_id"]: row["status"] for row in statuses} == {first: "superseded", second: "deployed"}
    assert {body["messages"][0]["content"] for path, body in endpoint.asked if path.endswith("chat/completions")} == {
        "Who?"
    }
    assert json.loads(hub.repositories["acme/support"].files["brightrun.json"])["job_id"] == str(first)
    assert "HOME" in (queue.folder / "environment.json").read_text(), "the trainer's, read with all else"
    for secret in (TOKEN, KEY):
        assert secret not in everything(queue)


async def test_a_job_without_a_word_is_served_where_there_is_an_endpoint_and_never_fails_by_it(
    queue: Queue, hub: HubUploads, endpoint: EndpointDouble
) -> None:
    endpoint.base = endpoint.root = "another"

    def work() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        with host(queue, hub, endpoint):
            plain = queue.insert()
            unserved = queue.insert(hyperparameters={"base_model": "tiny", "deploy": False})
            asked = queue.insert(hyperparameters={"base_model": "tiny", "deploy": True})
            assert delivered(queue, plain, "endpoint")["state"] == "failed"
            queue.wait_for(unserved, "completed")
            queue.wait_for(asked, "failed")
            assert queue.select("SELECT FROM training_deliveries WHERE job_id = %s", unserved) == []
            assert "endpoint_misfit" in [event["kind"] for event in queue.events(plain)]
            return queue.row(plain), queue.row(asked), queue.row(unserved)

    plain, asked, unserved = await beside(work)
    assert plain["status"] == "completed" and plain["deployed_at"] is None
    assert "serves another, and the adapter is one of tiny" in plain["deployment_note"]
    assert asked["error_code"] == "invalid_spec" and "would not fit the endpoint" in asked["error_message"]
    assert unserved["deployment_note"] is None


async def test_a_name_belongs_to_its_first_owner(queue: Queue, hub: HubUploads, endpoint: EndpointDouble) -> None:
    stranger = UUID("5ffb2a1e-6f5e-4d9e-9d63-64ad0c4f2a11")
    queue.select("INSERT INTO auth.users (id, email) VALUES (%s, 's@example.test') RETURNING id", stranger)
    asked = {"base_model": "tiny", "deploy": "support"}

    def work() -> tuple[UUID, UUID]:
        with host(queue, hub, endpoint):
            first = queue.insert(hyperparameters=asked)
            delivered(queue, first, "endpoint")
            second = queue.insert(hyperparameters=asked, user_id=stranger)
            assert delivered(queue, second, "endpoint")["state"] == "done"
        return first, second

    first, second = await beside(work)
    assert queue.row(first)["deployed_as"] == "support"
    row = queue.row(second)
    assert (row["deployed_as"], row["deployment_note"]) == (
        str(second),
        "Somebody else's adapter is served as support.",
    )
    assert set(endpoint.adapters) == {"support", str(first), str(second)}


async def test_a_name_that_the_operator_serves_is_not_replaced(
    queue: Queue, hub: HubUploads, endpoint: EndpointDouble
) -> None:
    theirs = endpoint.adapters["support"] = Loaded("/operator/support", "I am the operator's.")
    stolen = queue.insert(hyperparameters={"base_model": "tiny", "deploy": "5ffb2a1e-6f5e-4d9e-9d63-64ad0c4f2a11"})

    def work() -> dict[str, Any]:
        with host(queue, hub, endpoint):
            job = queue.insert(hyperparameters={"base_model": "tiny", "deploy": "support"})
            assert delivered(queue, job, "endpoint")["state"] == "done"
            queue.wait_for(stolen, "failed")
            return queue.row(job)

    row = await beside(work)
    assert (row["deployed_as"], row["deployment_note"]) == (
        str(row["id"]), "Somebody else's adapter is served as support.",
    )  # fmt: skip
    assert endpoint.adapters["support"] is theirs
    assert "must not look like a job's id" in queue.row(stolen)["error_message"]


async def test_only_the_service_says_that_a_job_is_deployed(queue: Queue) -> None:
    job = queue.insert(deployed_as="support")
    assert queue.row(job)["deployed_as"] is None
    for column, value in (("deployed_at", "now()"), ("deployed_as", "'x'"), ("deployment_note", "'x'")):
        with pytest.raises(Exception, match="written by the trainer only"), queue.connect() as connection:
            connection.execute(f"UPDATE training_jobs SET {column} = {value} WHERE id = %s", (job,))


async def test_a_job_whose_owner_has_no_token_is_told_so_before_and_after(
    queue: Queue, hub: HubUploads, endpoint: EndpointDouble
) -> None:
    def work() -> tuple[dict[str, Any], list[Any]]:
        with host(queue, hub, endpoint, hub_tokens=f"{UUID(int=7)}={TOKEN}"):
            job = queue.insert(hyperparameters={"base_model": "tiny", "push_to_hub": "acme/x", "deploy": False})
            return delivered(queue, job, "hub"), queue.events(job)

    delivery, events = await beside(work)
    assert delivery["state"] == "failed" and "no token of yours" in delivery["error_message"]
    assert "no_hub_token" in [event["kind"] for event in events]
    assert hub.repositories == {}
