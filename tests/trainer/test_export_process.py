"""The process of an export: what it says, and that one which says nothing is ended."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from daemon.errors import HostFault
from daemon.trainer import export_process


async def test_an_export_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    hangs = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(export_process, "EXPORT_COMMAND", (sys.executable, "-c", hangs))
    monkeypatch.setattr(export_process, "SILENT_SECONDS", 3.0, raising=False)
    with pytest.raises(HostFault, match="said nothing"):
        await export_process.run_export({"kind": "merged"})
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
