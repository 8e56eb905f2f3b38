"""What follows a completed job, by whole daemons: nothing is lost, nothing is done that a job did not ask for, and
whatever becomes of a delivery, its job stays completed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.daemon_process import alive, eventually
from tests.doubles.tcp_proxy import TcpProxy
from tests.lifecycle.project import Project

FILES = {"config.json", "model.safetensors", "merges.txt"}


def insert(project: Project, *exports: str, **columns: Any) -> UUID:
    asked = Jsonb({"base_model": "tiny", "exports": list(exports)})
    return project.insert(hyperparameters=asked.obj, script=[["steps", 2, 0.0]], **columns)


def script(project: Project, **said: Any) -> None:
    """What the next exports do: see tests/doubles/scripted_export.py."""
    file = project.folder / "models" / "tiny" / "export.json"
    hidden = file.with_suffix(".new")
    hidden.write_text(json.dumps(said))
    hidden.replace(file)


def delivery(project: Project, job: UUID, kind: str = "merged") -> dict[str, Any]:
    rows = project.queue.select("SELECT * FROM training_deliveries WHERE job_id = %s AND kind = %s", job, kind)
    return rows[0] if rows else {}


async def reaches(project: Project, job: UUID, state: str, kind: str = "merged", **more: Any) -> dict[str, Any]:
    def reached() -> dict[str, Any] | None:
        row = delivery(project, job, kind)
        return row if row.get("state") == state and all(row[key] == value for key, value in more.items()) else None

    return await asyncio.to_thread(
        eventually, reached, seconds=40.0, why=lambda: f"not {state}: {delivery(project, job, kind)}"
    )


async def working_export(project: Project, wait_for: Path) -> int:
    """Returns the pid of an export that has begun and waits for this file."""
    pid = Path(f"{wait_for}.pid")
    return int(await asyncio.to_thread(eventually, lambda: pid.read_text() if pid.exists() else None))


def stored(project: Project, folder: str) -> dict[str, str]:
    """The objects below a folder of the bucket, by name, with their hashes."""
    names = [name for name in project.objects() if name.startswith(f"{folder}/")]
    return {
        name.removeprefix(f"{folder}/"): hashlib.sha256(project.storage.read("lora-models", name)).hexdigest()
        for name in names
    }


async def test_an_export_is_stored_beside_the_adapter_and_told(project: Project) -> None:
    with project.daemon():
        job = insert(project, "merged", "gguf")
        await project.wait_for(job, "completed")
        row, other = await reaches(project, job, "done"), await reaches(project, job, "done", "gguf")
        (told, *_more) = await project.endings(job, "job.delivered")
        # This host's disk is free again.
        folder = project.folder / "jobs" / ".deliveries"
        await asyncio.to_thread(eventually, lambda: not list(folder.iterdir()))
    for each, kind in ((row, "merged"), (other, "gguf")):
        result = each["result"]
        assert result["path"] == f"lora-models/adapters/{job}/{kind}"
        objects = stored(project, f"adapters/{job}/{kind}")
        assert set(objects) == FILES | {"delivery.json"}
        assert {name: file["sha256"] for name, file in result["files"].items()} | {
            "delivery.json": result["manifest_sha256"]
        } == objects
        assert result["base_model"] == "tiny" and each["attempts"] == 1 and each["lock_token"] is None
    manifest = json.loads(project.storage.read("lora-models", f"adapters/{job}/merged/delivery.json"))
    assert manifest["job_id"] == str(job) and set(manifest["files"]) == FILES
    # What was uploaded is accounted for, and found if the job is deleted.
    uploads = project.queue.select("SELECT kind, manifest_sha256 FROM training_uploads WHERE job_id = %s", job)
    assert {upload["kind"]: upload["manifest_sha256"] for upload in uploads if upload["kind"] != "adapter"} == {
        "merged": row["result"]["manifest_sha256"],
        "gguf": other["result"]["manifest_sha256"],
    }
    # The story, the callback and the status say the same.
    states = [e["data"]["state"] for e in project.queue.events(job) if e["data"].get("delivery") == "merged"]
    assert states == ["waiting", "running", "done"]
    assert "files" not in told.payload["deliveries"][0]["result"] and told.payload["status"] == "completed"
    (status,) = project.queue.select("SELECT * FROM training_job_status WHERE job_id = %s", job)
    shown = {each["kind"]: each["state"] for each in status["contract"]["deliveries"]}
    assert shown == {"merged": "done", "gguf": "done"}


async def test_a_job_that_asks_for_nothing_gets_nothing(project: Project) -> None:
    with project.daemon():
        job = insert(project)
        await project.wait_for(job, "completed")
    assert not project.queue.select("SELECT id FROM training_deliveries")
    assert "delivery" not in project.queue.story(job)


async def test_an_export_that_is_whole_on_the_volume_is_not_made_again(project: Project) -> None:
    held = project.storage.fail("POST", "merged/", held_until=asyncio.Event(), times=1_000)
    with project.daemon("first") as first:
        job = insert(project, "merged")
        await asyncio.to_thread(eventually, lambda: held.times < 1_000, why=first.tail)
        os.kill(first.pid, signal.SIGKILL)
    project.storage.faults.clear()
    script(project, failed={"code": "internal", "message": "It is made twice.", "hint": "Do not."})
    with project.daemon("second"):
        row = await reaches(project, job, "done")
    assert row["result"]["path"].endswith("/merged-2")


async def test_a_host_killed_in_mid_export_loses_nothing(project: Project) -> None:
    go = project.folder / "go"
    script(project, wait_for=str(go))
    with project.daemon("first") as first:
        job = insert(project, "merged")
        pid = await working_export(project, go)
        os.kill(first.pid, signal.SIGKILL)
        # It holds no secret, and ends with its daemon.
        await asyncio.to_thread(eventually, lambda: not alive(pid))
    assert delivery(project, job)["state"] == "running"
    script(project)
    with project.daemon("second"):
        row = await reaches(project, job, "done")
    assert row["claims"] == 2 and row["result"]["path"].endswith("/merged-2")
    assert project.queue.row(job)["status"] == "completed"
    assert set(stored(project, f"adapters/{job}/merged-2")) == FILES | {"delivery.json"}


def recorded(project: Project) -> list[int]:
    """The claims of which objects may be in storage."""
    rows = project.queue.select("SELECT epoch FROM training_uploads WHERE kind = 'merged' ORDER BY epoch")
    return [row["epoch"] for row in rows]


async def test_what_a_killed_host_had_stored_is_deleted(project: Project) -> None:
    with project.daemon("first") as first:
        job = insert(project, "merged")
        held = project.storage.fail("POST", "merged/model.safetensors", held_until=asyncio.Event(), times=1_000)
        await asyncio.to_thread(eventually, lambda: held.times < 1_000, why=first.tail)
        os.kill(first.pid, signal.SIGKILL)
    project.storage.faults.clear()
    assert stored(project, f"adapters/{job}/merged")
    with project.daemon("second"):
        await reaches(project, job, "done")
    # The hourly sweep, now.
    project.queue.select("UPDATE training_uploads SET noted_at = noted_at - interval '2 days'")
    third = project.daemon("third")
    third.environment["SWEEP_SECONDS"] = "0.5"
    with third:
        await asyncio.to_thread(eventually, lambda: recorded(project) == [2])
    assert not stored(project, f"adapters/{job}/merged")
    assert set(stored(project, f"adapters/{job}/merged-2")) == FILES | {"delivery.json"}


async def test_what_cannot_be_done_says_why_and_its_job_stays_completed(project: Project) -> None:
    said = {"code": "model_unsupported", "message": "No reader knows it.", "hint": "Use the adapter."}
    script(project, failed=said)
    with project.daemon():
        job = insert(project, "merged")
        row = await reaches(project, job, "failed")
        (told,) = await project.endings(job, "job.delivery_failed")
        assert (row["error_code"], row["error_message"], row["error_hint"]) == tuple(said.values())
        assert told.payload["status"] == "completed" and told.payload["delivery"] == str(row["id"])
        assert project.queue.row(job)["status"] == "completed"
        # Asked for again, once it can be done.
        script(project)
        project.queue.select("SELECT redeliver(%s, 'merged')", job)
        row = await reaches(project, job, "done")
        # One that was not asked for before the training goes to hosts of the adapter's storage, too.
        project.queue.select("SELECT redeliver(%s, 'transformers4')", job)
        other = await reaches(project, job, "done", kind="transformers4")
        with pytest.raises(psycopg.Error, match="no such delivery"):
            project.queue.select("SELECT redeliver(%s, 'gguf', 'x')", job)
    assert row["attempts"] == 1 and row["error_code"] is None
    assert row["result"]["path"].endswith("/merged-2")
    assert other["storage"] == row["storage"] is not None


async def test_an_export_that_kills_its_process_is_tried_again_and_ends(project: Project) -> None:
    script(project, dies=True)
    with project.daemon():
        job = insert(project, "merged")
        row = await reaches(project, job, "failed")
    assert row["attempts"] == 6 and "exit status 3" in row["error_message"] and "memory" in row["error_hint"]
    assert project.queue.row(job)["status"] == "completed"


async def test_a_host_that_shuts_down_gives_the_delivery_back_uncounted(project: Project) -> None:
    go = project.folder / "go"
    script(project, wait_for=str(go))
    with project.daemon("first") as first:
        job = insert(project, "merged")
        pid = await working_export(project, go)
        first.signal(signal.SIGTERM)
        await asyncio.to_thread(first.wait)
        assert not alive(pid)
    row = delivery(project, job)
    assert (row["state"], row["attempts"], row["claims"]) == ("waiting", 0, 1)
    assert project.queue.row(job)["status"] == "completed"
    script(project)
    with project.daemon("second"):
        row = await reaches(project, job, "done")
    assert row["attempts"] == 1 and row["result"]["path"].endswith("/merged")


async def test_a_host_that_drains_finishes_what_it_has_begun(project: Project) -> None:
    go = project.folder / "go"
    script(project, wait_for=str(go))
    with project.daemon("first") as first:
        job = insert(project, "merged", "gguf")
        await working_export(project, go)
        first.signal(signal.SIGUSR1)
        first.wait_for_log("worker_draining")
        go.touch()
        await asyncio.to_thread(first.wait)
    # The row of its host stays until then: the fleet would take the pod for one that was left.
    states = {kind: delivery(project, job, kind)["state"] for kind in ("merged", "gguf")}
    assert sorted(states.values()) == ["done", "waiting"]


async def test_a_job_that_waits_is_trained_while_an_export_runs(project: Project) -> None:
    go = project.folder / "go"
    script(project, wait_for=str(go))
    with project.daemon():
        first = insert(project, "merged")
        await working_export(project, go)
        await project.wait_for(insert(project), "completed")
        assert delivery(project, first)["state"] == "running"
        go.touch()
        await reaches(project, first, "done")


async def test_a_storage_that_is_away_counts_no_try(project: Project) -> None:
    with project.daemon() as host:
        job = insert(project, "merged")
        away = project.storage.fail("POST", "merged/", status=400, times=1_000_000)
        row = await reaches(project, job, "waiting", attempts=0, error_code="upload_failed")
        assert row["error_message"] and project.queue.row(job)["status"] == "completed"
        await asyncio.to_thread(eventually, lambda: "a delivery" in troubles(project), why=host.tail)
        away.times = 0
        row = await reaches(project, job, "done")
        await asyncio.to_thread(eventually, lambda: "a delivery" not in troubles(project), why=host.tail)
    assert row["attempts"] == 1 and row["error_message"] is None


async def test_a_database_that_is_away_costs_no_export(project: Project) -> None:
    go = project.folder / "go"
    script(project, wait_for=str(go))
    port = psycopg.conninfo.conninfo_to_dict(project.queue.dsn)["port"]
    with TcpProxy(int(port or 0)) as proxy:
        host = project.daemon()
        host.environment["DATABASE_URL"] = proxy.dsn(project.queue.dsn)
        with host:
            job = insert(project, "merged")
            await working_export(project, go)
            proxy.partition()
            # Its lock runs out, and nobody else is there to take it.
            await asyncio.to_thread(eventually, lambda: lapsed(project, job), why=host.tail)
            go.touch()
            made = project.folder / "jobs" / ".deliveries"
            await asyncio.to_thread(eventually, lambda: list(made.glob("*/made.json")), why=host.tail)
            # Nothing is stored that no row accounts for.
            assert not stored(project, f"adapters/{job}/merged")
            assert delivery(project, job)["state"] == "running"
            proxy.heal()
            row = await reaches(project, job, "done")
    assert (row["attempts"], row["claims"]) == (1, 1)


def lapsed(project: Project, job: UUID) -> bool:
    (row,) = project.queue.select(
        "SELECT locked_until < clock_timestamp() AS over FROM training_deliveries WHERE job_id = %s", job
    )
    return bool(row["over"])


async def test_a_full_disk_is_the_hosts_fault(project: Project) -> None:
    script(project, failed={"code": "disk_full", "message": "The disk is full.", "hint": "Free space."})
    with project.daemon() as host:
        job = insert(project, "merged")
        row = await reaches(project, job, "waiting", attempts=0, error_code="disk_full")
        # Not a word about this host's folders in what the owner reads.
        assert str(project.folder) not in json.dumps(row, default=str)
        await asyncio.to_thread(eventually, lambda: "a delivery" in troubles(project), why=host.tail)
        # The host goes on with its jobs.
        await project.wait_for(insert(project), "completed")
        script(project)
        await reaches(project, job, "done")


def troubles(project: Project) -> set[str]:
    rows = project.queue.select("SELECT data -> 'troubles' AS troubles FROM training_workers WHERE state <> 'gone'")
    return {trouble["name"] for row in rows for trouble in row["troubles"] or ()}


@pytest.mark.parametrize("allowed", ["none", "gguf"])
async def test_a_host_does_only_the_kinds_that_it_is_told(project: Project, allowed: str) -> None:
    with project.daemon("first", deliveries=allowed):
        job = insert(project, "merged", "gguf")
        await project.wait_for(job, "completed")
        if allowed == "gguf":
            await reaches(project, job, "done", "gguf")
        assert delivery(project, job)["state"] == "waiting"
    # Others leave it for half a minute to the host that trained.
    project.queue.select("UPDATE training_deliveries SET next_at = clock_timestamp()")
    with project.daemon("second"):
        await reaches(project, job, "done")
