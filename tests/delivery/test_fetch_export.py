"""Fetching a stored export into a new folder: what lies there afterwards is that export, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from daemon.delivery.exported import MANIFEST
from daemon.delivery.fetch_export import fetch_export
from daemon.storage.folder import FolderStorage


def store(storage: Path, folder: str, **files: bytes) -> dict[str, Any]:
    """Stores an export as a delivery does; returns its result."""
    place = storage / "lora-models" / folder
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    text = json.dumps({"files": listed}).encode()
    (place / MANIFEST).write_bytes(text)
    path = f"lora-models/{folder}"
    return {"path": path, "manifest": f"{path}/{MANIFEST}", "manifest_sha256": hashlib.sha256(text).hexdigest()}


async def test_what_the_download_of_another_export_left_is_not_mixed_in(tmp_path: Path) -> None:
    """A reader of the folder would take the other model's files for parts of this one."""
    result = store(tmp_path / "storage", "adapters/b/merged", config=b"{}", weights=b"new")
    left = tmp_path / ".model.part"
    left.mkdir()
    (left / "weights-00001-of-00002").write_bytes(b"another model's")
    (left / "weights").write_bytes(b"old")
    (left / "config").write_bytes(b"{}")

    await fetch_export(FolderStorage(tmp_path / "storage"), result, tmp_path / "model")

    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config", "weights", MANIFEST}
    assert (tmp_path / "model" / "weights").read_bytes() == b"new"
    assert not left.exists()
