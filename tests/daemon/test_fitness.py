"""A host that was found broken takes no job until the broken part works: what the probes take for working."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from daemon import fitness
from daemon.fitness import Fitness, probe_folder
from daemon.host.gpus import Gpu
from daemon.host.inspect import Host
from daemon.settings import Settings
from daemon.storage.folder import FolderStorage
from daemon.trainer.run_selfcheck import Selfcheck, read_selfcheck
from daemon.troubles import Troubles

CARD = Gpu(index=0, name="NVIDIA A100", memory_gb=80.0)
HOST = Host("cuda", (CARD,))


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (read_selfcheck(0, json.dumps({"nf4_error": None}), ""), None),
        (read_selfcheck(1, "", "Traceback …\nAssertionError: no CUDA\n"), "GPU 0: AssertionError: no CUDA"),
        (
            read_selfcheck(0, json.dumps({"nf4_error": "RuntimeError: GPU is lost"}), ""),
            "GPU 0: RuntimeError: GPU is lost",
        ),
    ],
    ids=["it computes", "the libraries fail", "the card fails"],
)
async def test_a_card_is_mended_when_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Selfcheck, fault: str | None
) -> None:
    async def selfcheck(_device: str, _gpus: tuple[str, ...], _seconds: float) -> Selfcheck:
        return said

    monkeypatch.setattr(fitness, "run_selfcheck", selfcheck)
    monkeypatch.setattr(fitness, "find_gpus", lambda: (CARD,))
    settings = Settings(_env_file=None, database_url="postgresql://x", work_dir=tmp_path)
    assert await Fitness(settings, HOST, (), Troubles(), FolderStorage(tmp_path)).probe("GPU") == fault


def test_a_folder_that_gives_back_other_bytes_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_folder(tmp_path) is None
    written = os.fsync

    def spoil(descriptor: int) -> None:
        written(descriptor)
        os.pwrite(descriptor, b"other bytes", 5)

    monkeypatch.setattr(os, "fsync", spoil)
    assert probe_folder(tmp_path) == f"{tmp_path}: a file reads back otherwise than it was written"
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "MIN_FREE_BYTES", 2**60)
    assert "MiB are free" in str(probe_folder(tmp_path))
