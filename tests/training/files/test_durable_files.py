"""A file that is written to a temporary name appears complete, and only once it is on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from training.files.durable_files import beside, put_in_place, sync, write_whole


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records all later disk calls, in order."""
    asked: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        asked.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        asked.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return asked


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _recorded(monkeypatch)
    write_whole(tmp_path / "name", "new")
    assert asked == [f"sync .name.{os.getpid()}.part", "rename to name", f"sync {tmp_path.name}"]


def test_a_folder_is_on_the_disk_with_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    asked = _recorded(monkeypatch)
    with beside(tmp_path / "final") as hidden:
        (hidden / "inner").mkdir(parents=True)
        (hidden / "inner" / "file").write_text("new")
        put_in_place(hidden, tmp_path / "final")
    assert set(asked[:2]) == {"sync inner", "sync file"}
    assert asked[2:] == [f"sync .final.{os.getpid()}.part", "rename to final", f"sync {tmp_path.name}"]
    assert [path.name for path in (tmp_path / "final").rglob("*")] == ["inner", "file"]


def test_what_could_not_be_finished_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "name"
    write_whole(file, "old")
    with pytest.raises(ZeroDivisionError), beside(file) as hidden:
        hidden.write_text("ne")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["name"] and file.read_text() == "old"


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    write_whole(tmp_path / "address", "secret", mode=0o600)
    assert (tmp_path / "address").stat().st_mode & 0o777 == 0o600


def test_a_volume_that_cannot_sync_a_folder_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuses_folders)
    write_whole(tmp_path / "name", "new")
    assert (tmp_path / "name").read_text() == "new"


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuses)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(tmp_path / "name", "new")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)
