"""Schemathesis against the OpenAPI description: what it promises is what is answered, whatever is sent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.conftest import KEY, Gateway
from tests.lifecycle.queue import Queue
from tests.paths import ROOT

ST = Path(sys.executable).with_name("schemathesis")
CONFIG = ROOT / "tests" / "gateway" / "schemathesis.toml"


@pytest.mark.system
def test_schemathesis_finds_nothing(queue: Queue, tmp_path: Path) -> None:
    """Every check, every phase, a fixed seed; the gateway's own log knows of no fault either."""
    with Gateway(queue, tmp_path, gateway_requests_per_second=10_000, gateway_wait_seconds=0) as gateway:
        run = subprocess.run(
            [
                str(ST), "--config-file", str(CONFIG), "run", f"{gateway.url}/openapi.json",
                "--checks", "all", "--max-examples", "30", "--seed", "1", "--no-color", "--workers", "1",
                "--header", f"Authorization: Bearer {KEY}",
            ],
            check=False, cwd=tmp_path, capture_output=True, text=True, timeout=160,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )  # fmt: skip
        assert not gateway.logged("gateway_broke"), gateway.tail()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
