"""Base models looked after on a host that knows no database yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cli.command import CommandLine
from tests.doubles.hub import COMMIT, HubDouble
from tests.lifecycle.queue import write_model_folder
from tests.tiny_models import make_model


@pytest.fixture
def alone(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path, TRAINER_MODELS_DIR=str(tmp_path / "models"))


def test_models_are_listed_with_their_faults(alone: CommandLine, tmp_path: Path) -> None:
    assert "models pull" in alone.ok("models", "list").out
    write_model_folder(tmp_path / "models" / "acme" / "whole")
    write_model_folder(tmp_path / "models" / "acme" / "cut")
    shard = tmp_path / "models" / "acme" / "cut" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    rows = {row["name"]: row for row in alone.ok("models", "list", "--json").lines}
    assert rows["acme/whole"]["faults"] == []
    assert "model.safetensors" in rows["acme/cut"]["faults"][0]
    assert "● broken" in alone.ok("models", "list").out


def test_a_damaged_model_is_named_and_fails_the_check(alone: CommandLine, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "models" / "acme" / "model")
    assert "is whole" in alone.ok("models", "verify", "acme/model").out
    (tmp_path / "models" / "acme" / "model" / "tokenizer.json").unlink()
    said = alone.run("models", "verify", "acme/model")
    assert said.status == 1
    assert "tokenizer" in said.out
    assert "models pull acme/model" in said.out
    assert alone.run("models", "verify", "acme/absent").status == 1
    assert "is not a model name" in alone.run("models", "pull", "../etc").err


def test_the_4_bit_copy_is_made_by_command_and_kept_alone_by_choice(alone: CommandLine, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "models" / "tiny" / "model", "qwen3")
    unasked = alone.run("models", "quantize", "tiny/model", "--replace")
    assert unasked.status == 2
    assert "--replace deletes" in unasked.err and "--yes" in unasked.err
    assert (folder / "model.safetensors").is_file()
    (replaced,) = alone.ok("models", "quantize", "tiny/model", "--replace", "--yes", "--json").lines
    assert replaced["ok"] and not replaced["made_before"]
    assert replaced["bytes"] > 0 and replaced["freed_bytes"] > 0
    assert replaced["path"] == str(folder) and not list(folder.glob("*.safetensors"))
    (listed,) = alone.ok("models", "list", "--json").lines
    assert listed["faults"] == [] and listed["bytes"] > 0
    shard = next((folder / "nf4").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-50] ^= 0xFF
    shard.write_bytes(content)
    damaged = alone.run("models", "verify", "tiny/model")
    assert damaged.status == 1
    assert f"nf4/{shard.name} is damaged" in damaged.out


def test_a_model_that_is_not_there_is_not_quantised(alone: CommandLine) -> None:
    said = alone.run("models", "quantize", "acme/absent")
    assert said.status == 1
    assert "models pull acme/absent" in said.err


async def test_a_model_is_pulled_with_its_progress_on_stderr(alone: CommandLine, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model_folder(source)
    async with HubDouble("acme/model", source) as hub:
        said = await asyncio.to_thread(alone.run, "models", "pull", "acme/model", HF_ENDPOINT=hub.url)
        assert said.status == 0, said
        assert "acme/model is whole" in said.out
        assert COMMIT[:12] in said.out
        absent = await asyncio.to_thread(alone.run, "models", "pull", "acme/other", HF_ENDPOINT=hub.url)
    assert absent.status == 1
    assert "acme/other" in absent.err
    assert len(absent.err.strip().splitlines()) == 2
