"""Daemon and trainer judge a base model's folder alike: what `models verify` calls whole is loaded, what it calls
incomplete is refused before the claim costs an attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.base_model.inventory import verify_model
from daemon.base_model.resolve import resolve_model
from daemon.errors import JobFailed
from daemon.settings import Settings
from tests.lifecycle.queue import write_model_folder
from training.failures import TrainingFailed
from training.files.model_folder import open_model_folder

NAME = "acme/model"
# What lies in the folder as its tokenizer, and whether transformers finds a vocabulary in it without remote code.
TOKENIZERS = {
    "tokenizer.json": True,
    "tokenizer.model": True,
    "spiece.model": True,
    "tekken.json": True,
    "vocab.txt": True,
    "vocab.json merges.txt": True,
    "vocab.json": False,
    "merges.txt": False,
    "qwen.tiktoken": False,
    "": False,
}
# What else may be wrong.
SPOILED = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "an empty config": lambda folder: (folder / "config.json").write_text("{}"),
    "a config that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights by another name": lambda folder: (folder / "model.safetensors").rename(folder / "part-1.safetensors"),
    "weights cut": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 7),
    "an index of nothing": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
    "an index that leads outside": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"weight": "../model/model.safetensors"}}'
    ),
    "a tensor that the index promises": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"weight": "model.safetensors", "other": "model.safetensors"}}'
    ),
    "a 4-bit copy without its list": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "nf4").mkdir(),
        (folder / "nf4" / "manifest.json").write_text("{}"),
    ),
}


async def _judgements(models: Path) -> tuple[bool, bool, bool]:
    """Whether resolution, `models verify` and the trainer take the folder."""
    settings = Settings(_env_file=None, database_url="postgresql://x", models_dir=models, model_downloads=False)
    try:
        await resolve_model(NAME, settings)
        resolved = True
    except JobFailed as refused:
        assert refused.code == "model_incomplete"
        resolved = False
    try:
        open_model_folder(models / NAME, NAME)
        opened = True
    except TrainingFailed as refused:
        assert refused.code == "model_incomplete"
        opened = False
    return resolved, not verify_model(NAME, settings), opened


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
async def test_daemon_and_trainer_take_the_same_tokenizers(tmp_path: Path, tokenizer: str) -> None:
    write_model_folder(tmp_path / NAME)
    (tmp_path / NAME / "tokenizer.json").unlink()
    for name in tokenizer.split():
        (tmp_path / NAME / name).write_text("{}")
    assert await _judgements(tmp_path) == (TOKENIZERS[tokenizer],) * 3


@pytest.mark.parametrize("fault", SPOILED)
async def test_daemon_and_trainer_refuse_the_same_folders(tmp_path: Path, fault: str) -> None:
    write_model_folder(tmp_path / NAME)
    SPOILED[fault](tmp_path / NAME)
    assert await _judgements(tmp_path) == (False,) * 3
