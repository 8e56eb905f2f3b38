"""An adapter folder becomes objects in storage: the same bytes each time, resumable anywhere, safe to unpack."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import random
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from daemon.errors import JobFailed
from daemon.storage.archive import ArchiveInvalid, pack_adapter, unpack_adapter
from daemon.storage.folder import FolderStorage
from daemon.storage.interface import StoredObject
from daemon.storage.publish import object_names, publish_adapter, withdraw_adapter
from daemon.storage.supabase import SupabaseStorage
from tests.doubles.storage import SERVICE_KEY, Bucket, StorageDouble

JOB = "11111111-2222-4333-8444-555555555555"
FACTS = {"base_model": "org/name", "base_model_revision": "abc", "hyperparameters": {"lora_rank": 8}}


def make_adapter(folder: Path, weights: int = 300_000) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(random.Random(1).randbytes(weights))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "training_log.jsonl").write_text('{"step": 1}\n')
    (folder / "metrics_chart.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "training.tfevents").write_bytes(b"points")
    return folder


def test_the_same_folder_gives_the_same_archive(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    first = pack_adapter(adapter, tmp_path / "one" / "a.tar.gz", FACTS)
    for file in adapter.rglob("*"):
        os.utime(file, (time.time() + 1000, time.time() + 1000))
        file.chmod(0o700)
    second = pack_adapter(adapter, tmp_path / "two" / "a.tar.gz", FACTS)
    assert first.archive == second.archive
    assert first.path.read_bytes() == second.path.read_bytes()


def test_an_archive_unpacks_to_what_was_packed(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    packed = pack_adapter(adapter, tmp_path / "a.tar.gz", {**FACTS, "final_loss": float("nan")})
    manifest = unpack_adapter(packed.path, tmp_path / "out")
    for file in adapter.rglob("*"):
        if file.is_file():
            assert (tmp_path / "out" / file.relative_to(adapter)).read_bytes() == file.read_bytes()
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert manifest["files"]["adapter_model.safetensors"] == {
        "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
    assert manifest["base_model"] == "org/name"
    assert manifest["final_loss"] is None, "JSON has no NaN"
    assert json.loads(packed.manifest)["archive"]["sha256"] == packed.archive.sha256
    # An ordinary tar opens it too.
    with tarfile.open(packed.path) as tar:
        assert {(member.uid, member.gid, member.mtime, member.mode) for member in tar} == {(0, 0, 0, 0o644)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "lacks adapter_config.json"),
        (lambda folder: (folder / "training_args.bin").write_bytes(b"\x80"), "may run code"),
        (lambda folder: (folder / "link.json").symlink_to("/etc/passwd"), "not a plain file"),
        (lambda folder: (folder / "links").symlink_to("/etc"), "not a plain file"),
        (lambda folder: os.mkfifo(folder / "pipe.json"), "not a plain file"),
        (lambda folder: (folder / "naïve name.json").write_text(""), "with the name"),
    ],
)
def test_a_folder_that_is_no_adapter_is_not_packed(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    spoil(adapter)
    with pytest.raises(JobFailed, match=message):
        pack_adapter(adapter, tmp_path / "a.tar.gz", FACTS)
    assert not (tmp_path / "a.tar.gz").exists()


# -- archives that somebody else made ---------------------------------------------------------------------------------


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], manifest: bool = True) -> Path:
    files = {
        member.name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for member, content in members
    }
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if manifest:
            text = json.dumps({"format": 1, "files": files}).encode()
            last = tarfile.TarInfo("manifest.json")
            last.size = len(text)
            tar.addfile(last, io.BytesIO(text))
    return path


def plain(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([(plain("../evil.json"), b"x")], "not a plain name"),
        ([(plain("/etc/cron.d/evil"), b"x")], "not a plain name"),
        ([(plain("a/../../evil"), b"x")], "not a plain name"),
        ([(plain("a/b/c"), b"x")], "not a plain name"),
        ([(plain(".hidden"), b"x")], "not a plain name"),
        ([(plain("a\\b"), b"x")], "not a plain name"),
        ([(plain("twice.json"), b"1"), (plain("twice.json"), b"1")], "occurs twice"),
        ([(plain("a"), b"1"), (plain("a/b"), b"1")], "both file and folder"),
        ([(plain("a/b"), b"1"), (plain("a"), b"1")], "both file and folder"),
        ([(plain("model.pt"), b"\x80")], "may run code"),
        ([(special("link", tarfile.SYMTYPE, "/etc/passwd"), b"")], "link, folder or device"),
        ([(special("link", tarfile.LNKTYPE, "other"), b"")], "link, folder or device"),
        ([(special("device", tarfile.CHRTYPE), b"")], "link, folder or device"),
        ([(special("fifo", tarfile.FIFOTYPE), b"")], "link, folder or device"),
        ([(special("folder", tarfile.DIRTYPE), b"")], "link, folder or device"),
    ],
)
def test_an_archive_with_a_dangerous_member_is_not_unpacked(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], message: str
) -> None:
    archive = archive_of(tmp_path / "bad.tar.gz", *members)
    with pytest.raises(ArchiveInvalid, match=message):
        unpack_adapter(archive, tmp_path / "inside" / "out")
    assert list((tmp_path / "inside").iterdir()) == [], "nothing is left"


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python's tarfile has no filters (before 3.11.4)")
@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil", "/etc/cron.d/evil"])
def test_a_name_that_our_own_rule_let_through_is_still_stopped_by_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("daemon.storage.archive._SAFE_NAME", re.compile(".*"))
    archive = archive_of(tmp_path / "bad.tar.gz", (plain(name), b"x"))
    with pytest.raises(ArchiveInvalid, match="outside the folder"):
        unpack_adapter(archive, tmp_path / "inside" / "out")
    assert list((tmp_path / "inside").iterdir()) == [], "nothing is left"


@pytest.mark.parametrize("keep", [0, 10, 1000, -200])
def test_a_damaged_archive_is_noticed(tmp_path: Path, keep: int) -> None:
    packed = pack_adapter(make_adapter(tmp_path / "adapter"), tmp_path / "a.tar.gz", FACTS)
    packed.path.write_bytes(packed.path.read_bytes()[:keep])
    with pytest.raises(ArchiveInvalid):
        unpack_adapter(packed.path, tmp_path / "out")


def test_content_that_is_not_the_manifests_is_noticed(tmp_path: Path) -> None:
    packed = pack_adapter(make_adapter(tmp_path / "adapter"), tmp_path / "a.tar.gz", FACTS)
    unzipped = gzip.decompress(packed.path.read_bytes())
    packed.path.write_bytes(gzip.compress(unzipped.replace(b'{"step": 1}', b'{"step": 2}')))
    with pytest.raises(ArchiveInvalid, match=r"training_log\.jsonl"):
        unpack_adapter(packed.path, tmp_path / "out")


def test_an_archive_without_a_manifest_is_not_ours(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "bad.tar.gz", (plain("adapter_config.json"), b"{}"), manifest=False)
    with pytest.raises(ArchiveInvalid, match="no manifest"):
        unpack_adapter(archive, tmp_path / "out")


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    packed = pack_adapter(make_adapter(tmp_path / "adapter"), tmp_path / "a.tar.gz", FACTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError):
        unpack_adapter(packed.path, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


# -- publishing -------------------------------------------------------------------------------------------------------


class KilledAfter(FolderStorage):
    """A folder storage whose daemon dies around the n-th upload: before it, or after it was stored."""

    def __init__(self, root: Path, uploads: int, *, stored: bool) -> None:
        super().__init__(root)
        self.left, self.stored = uploads, stored
        self.order: list[str] = []

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        self.left -= 1
        if self.left < 0 and not self.stored:
            raise KeyboardInterrupt
        stored = await super().upload(local, object_path, sha256=sha256, resume_dir=resume_dir)
        self.order.append(object_path)
        if self.left < 0:
            raise KeyboardInterrupt
        return stored


def objects_in(root: Path) -> dict[str, str]:
    folder = root / "lora-models"
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


async def test_what_is_published_is_named_as_the_app_expects(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "root")
    adapter = make_adapter(tmp_path / "adapter")
    completed = await publish_adapter(storage, adapter, JOB, 1, FACTS, tmp_path / "work")
    assert completed.adapter_path == f"lora-models/adapters/{JOB}.tar.gz"
    assert completed.artifacts == {
        "archive": f"adapters/{JOB}.tar.gz",
        "adapter_model": f"adapters/{JOB}/adapter_model.safetensors",
        "adapter_config": f"adapters/{JOB}/adapter_config.json",
        "training_logs": f"adapters/{JOB}/training_log.jsonl",
        "metrics_chart": f"adapters/{JOB}/metrics_chart.png",
        "tensorboard": f"adapters/{JOB}/training.tfevents",
        "manifest": f"adapters/{JOB}/manifest.json",
    }
    assert set(objects_in(tmp_path / "root")) == set(completed.artifacts.values()) == set(object_names(JOB, 1).all())
    assert objects_in(tmp_path / "root")[completed.artifacts["archive"]] == completed.adapter_sha256
    assert not (tmp_path / "work" / "publish").exists(), "nothing is left on the host"


async def test_what_the_trainer_did_not_write_is_not_promised(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "metrics_chart.png").unlink()
    completed = await publish_adapter(FolderStorage(tmp_path / "root"), adapter, JOB, 1, FACTS, tmp_path / "work")
    assert "metrics_chart" not in completed.artifacts


async def test_a_later_attempt_writes_under_names_of_its_own(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "root")
    first = await publish_adapter(storage, make_adapter(tmp_path / "a"), JOB, 1, FACTS, tmp_path / "work")
    before = objects_in(tmp_path / "root")
    second = await publish_adapter(storage, make_adapter(tmp_path / "b", 5000), JOB, 7, FACTS, tmp_path / "work")
    assert second.adapter_path == f"lora-models/adapters/{JOB}-e7.tar.gz"
    assert not set(first.artifacts.values()) & set(second.artifacts.values())
    assert objects_in(tmp_path / "root").items() >= before.items(), "nothing of the first was touched"
    await withdraw_adapter(storage, JOB, 1)
    await withdraw_adapter(storage, JOB, 1)
    assert set(objects_in(tmp_path / "root")) == set(second.artifacts.values())


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("uploads", range(6))
async def test_a_daemon_killed_between_any_two_uploads_ends_with_the_same_objects(
    tmp_path: Path, uploads: int, stored: bool
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    whole = await publish_adapter(FolderStorage(tmp_path / "whole"), adapter, JOB, 1, FACTS, tmp_path / "w")
    dying = KilledAfter(tmp_path / "root", uploads, stored=stored)
    with pytest.raises(KeyboardInterrupt):
        await publish_adapter(dying, adapter, JOB, 1, FACTS, tmp_path / "work")
    manifest = object_names(JOB, 1).beside("manifest.json")
    assert manifest not in dying.order or len(dying.order) == 6, "the manifest is the last"
    again = await publish_adapter(FolderStorage(tmp_path / "root"), adapter, JOB, 1, FACTS, tmp_path / "work")
    assert again == whole
    assert objects_in(tmp_path / "root") == objects_in(tmp_path / "whole")


async def test_an_upload_cut_off_at_any_point_is_finished_by_the_next_daemon(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", weights=14_000_000)
    async with StorageDouble(tmp_path / "double") as double:
        double.buckets["lora-models"] = Bucket()
        job = uuid4()
        for patches_before_the_end in (0, 1, 2):
            storage = SupabaseStorage(double.url, SERVICE_KEY, first_wait_seconds=0.01)
            seen = double.count("PATCH")
            publishing = asyncio.create_task(publish_adapter(storage, adapter, job, 1, FACTS, tmp_path / "work"))
            async with asyncio.timeout(30):
                while double.count("PATCH") - seen <= patches_before_the_end and not publishing.done():
                    await asyncio.sleep(0.002)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await storage.close()
        storage = SupabaseStorage(double.url, SERVICE_KEY, first_wait_seconds=0.01)
        completed = await publish_adapter(storage, adapter, job, 1, FACTS, tmp_path / "work")
        archive = double.path_of("lora-models", completed.artifacts["archive"])
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == completed.adapter_sha256
        assert await storage.verify(completed.artifacts["archive"], completed.adapter_bytes, completed.adapter_sha256)
        await storage.close()
        unpack_adapter(archive, tmp_path / "out")
