"""A completed job's adapter on this machine: as the row promises, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

import pytest

from tests.cli.command import CommandLine
from tests.lifecycle.queue import Queue


@pytest.fixture
def completed(queue: Queue) -> UUID:
    job = queue.insert()
    with queue.daemon(queue.folder):
        queue.wait_for(job, "completed")
    return job


def test_an_adapter_is_fetched_verified_and_unpacked(cli: CommandLine, queue: Queue, completed: UUID) -> None:
    said = cli.ok("download", str(completed)[:8], "--to", "mine", "--json").lines[0]
    folder = queue.folder / "mine"
    assert said["path"] == str(folder)
    assert said["sha256"] == queue.row(completed)["adapter_sha256"]
    assert (folder / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "manifest.json").read_text())["base_model"] == "tiny"
    again = cli.run("download", completed, "--to", "mine")
    assert again.status == 2
    assert "not empty" in again.err


def test_an_object_that_is_not_the_row_s_is_refused_and_leaves_nothing(
    cli: CommandLine, queue: Queue, completed: UUID
) -> None:
    stored: Path = queue.folder / "storage" / queue.row(completed)["adapter_path"]
    stored.write_bytes(stored.read_bytes() + b"x")
    before = sorted(path.name for path in queue.folder.iterdir())
    said = cli.run("download", completed)
    assert said.status == 1
    assert "is not the one of this job" in said.err
    assert sorted(path.name for path in queue.folder.iterdir()) == before
    stored.unlink()
    assert "is not in storage" in cli.run("download", completed).err


def test_an_unfinished_job_has_no_adapter(cli: CommandLine, queue: Queue) -> None:
    said = cli.run("download", queue.insert())
    assert said.status == 1
    assert "is queued and has no adapter" in said.err


def test_a_talk_needs_an_adapter_and_its_base_model(cli: CommandLine, completed: UUID, queue: Queue) -> None:
    assert "no adapter_config.json" in cli.run("chat", queue.folder, "-q", "x").err
    said = cli.run("chat", completed, "-q", "Why?", "--model", queue.folder)
    assert said.status == 1
    assert "there is no config.json" in said.err
    cached = cli.run("chat", completed, "-q", "Why?")
    assert "does not say which base model" in cached.err


def test_what_cannot_be_delivered_again_is_named(cli: CommandLine, completed: UUID) -> None:
    unknown = cli.run("redeliver", str(completed)[:8], "merge")
    assert (unknown.status, "'merge' is no delivery" in unknown.err) == (2, True)
    assert "merged, gguf, transformers4, hub, endpoint" in unknown.err
    aimed = cli.run("redeliver", str(completed)[:8], "merged", "--target", "x")
    assert (aimed.status, "has no target" in aimed.err) == (2, True)
