"""A merge of a model that does not fit into memory, one that is killed, and disks without room."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.training.export.large_model import write_large_adapter, write_large_model
from training.export.merge import merge_adapter
from training.failures import TrainingFailed
from training.files.durable_files import sha256_of

HIDDEN, LAYERS = 768, 8

# Imports what a merge imports, then allows itself two of the model's files more, and at last says its peak.
BOUNDED = """
import json, resource, sys
from pathlib import Path
from training.export.merge import merge_adapter
from training.export.merging.stored_names import StoredNames
from training.files.model_folder import ModelFolder
base, adapter, into, more = sys.argv[1:]
StoredNames(ModelFolder.of(Path(base)), "acme/large")
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
held = 1024 * int(status["VmData"].split()[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_DATA, (held + int(more),) * 2)
merge_adapter(Path(base), Path(adapter), Path(into))
print(json.dumps({"grown": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}))
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, in eight files, and adapter/."""
    root = tmp_path_factory.mktemp("large")
    write_large_model(root / "base", hidden=HIDDEN, layers=LAYERS)
    write_large_adapter(root / "adapter", hidden=HIDDEN, layers=LAYERS)
    return root


@pytest.mark.system
def test_a_merge_takes_no_more_memory_than_two_of_the_models_files(large: Path, tmp_path: Path) -> None:
    shard = max(file.stat().st_size for file in (large / "base").glob("*.safetensors"))
    words = [sys.executable, "-c", BOUNDED, large / "base", large / "adapter", tmp_path / "merged", str(2 * shard)]
    said = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    assert json.loads(said.stdout)["grown"] < 2 * shard


@pytest.mark.system
def test_a_model_larger_than_the_memory_is_merged(tmp_path: Path) -> None:
    """The whole process, libraries and all, within two files and a GiB: a third of the model."""
    shard = write_large_model(tmp_path / "base", hidden=4096, layers=12)
    write_large_adapter(tmp_path / "adapter", hidden=4096, layers=12)
    most = 2 * shard + 2**30
    assert 12 * shard > 2.5 * most
    request = {"kind": "merged", **{name: str(tmp_path / name) for name in ("base", "adapter")}}

    def within_the_bound() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    ended = subprocess.run(
        [sys.executable, "-m", "training.export"],
        input=json.dumps(request | {"into": str(tmp_path / "merged")}),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=within_the_bound,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    # Of all children of this process; libraries' own pages count as well.
    assert 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < most


def start(large: Path, into: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "training.export"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    request = {"kind": "merged", "base": str(large / "base"), "adapter": str(large / "adapter"), "into": str(into)}
    assert process.stdin is not None
    process.stdin.write(json.dumps(request))
    process.stdin.close()
    return process


def test_a_killed_merge_goes_on_where_it_was_and_ends_the_same(large: Path, tmp_path: Path) -> None:
    into, unfinished = tmp_path / "merged", tmp_path / ".merged.part"
    with start(large, into) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if said["done_bytes"] > said["total_bytes"] / 2:
                process.send_signal(signal.SIGKILL)
                break
    assert not into.exists()
    recorded = json.loads((unfinished / ".state.json").read_text())["files"]
    assert 0 < len(recorded) < LAYERS
    inodes = {name: (unfinished / name).stat().st_ino for name in recorded}
    # One of those that were whole is damaged meanwhile.
    damaged, *right = recorded
    with (unfinished / damaged).open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"\xff")
    (unfinished / "stray.safetensors").write_bytes(b"x")
    merged = merge_adapter(large / "base", large / "adapter", into)
    assert right and all((into / name).stat().st_ino == inodes[name] for name in right)
    assert not unfinished.exists() and not (into / "stray.safetensors").exists()
    for name, file in merged.files.items():
        assert sha256_of(into / name) == file.sha256
    at_once = merge_adapter(large / "base", large / "adapter", tmp_path / "at_once")
    assert at_once.files == merged.files


def test_what_another_adapter_left_unfinished_is_not_used(large: Path, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 3:
            raise Stopped

    with pytest.raises(Stopped):
        merge_adapter(large / "base", large / "adapter", tmp_path / "merged", on_bytes=stop)
    assert json.loads((tmp_path / ".merged.part" / ".state.json").read_text())["files"]
    other = write_large_adapter(tmp_path / "other", hidden=HIDDEN, layers=LAYERS, seed=1)
    merged = merge_adapter(large / "base", other, tmp_path / "merged")
    assert merged.files == merge_adapter(large / "base", other, tmp_path / "alone").files


def test_a_disk_without_room_is_found_before_anything_is_written(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(2**30, 2**30 - 2**27, 2**27))
    with pytest.raises(TrainingFailed) as refused:
        merge_adapter(large / "base", large / "adapter", tmp_path / "merged")
    assert (refused.value.code, "0.1 GiB are free" in refused.value.message) == ("disk_full", True)
    assert list(tmp_path.iterdir()) == []


def test_one_folder_is_never_written_twice_at_once(large: Path, tmp_path: Path) -> None:
    refusals = []

    def begin_another(_done: int, _total: int) -> None:
        if not refusals:
            with pytest.raises(TrainingFailed) as refused:
                merge_adapter(large / "base", large / "adapter", tmp_path / "merged")
            refusals.append(refused.value.message)

    merged = merge_adapter(large / "base", large / "adapter", tmp_path / "merged", on_bytes=begin_another)
    assert refusals == [f"another process is writing {tmp_path / 'merged'}"]
    assert all(sha256_of(tmp_path / "merged" / name) == file.sha256 for name, file in merged.files.items())


def test_a_process_that_is_not_told_what_to_do_says_so(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "training.export"]
    said = subprocess.run(words, input='{"kind": "gold"}', env=ENVIRONMENT, capture_output=True, text=True, check=False)
    answer = json.loads(said.stdout)
    assert (said.returncode, answer["kind"], answer["code"]) == (1, "failed", "invalid_spec")
