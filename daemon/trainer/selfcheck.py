"""Asks the libraries, in a process of their own, whether they compute on this device: training.preflight.selfcheck."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from daemon.trainer.environment import child_environment


@dataclass(frozen=True)
class Selfcheck:
    """What the selfcheck found; `crash` is its last word where it did not come to an answer."""

    found: dict[str, Any] = field(default_factory=dict)
    crash: str | None = None

    @property
    def fault(self) -> str | None:
        """Why nothing can be trained on this device, in one line; None when a 4-bit layer computed what it should."""
        return self.crash or self.found["nf4_error"]


async def run_selfcheck(device: str, gpus: tuple[int, ...], seconds: float) -> Selfcheck:
    """Check "cpu", or "cuda" with these GPUs alone. Raises TimeoutError when there is no answer in time."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "training.preflight.selfcheck", device),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(os.environ, gpus),
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return read_selfcheck(process.returncode or 0, output.decode(), errors.decode(errors="replace"))


def read_selfcheck(exit_code: int, output: str, errors: str) -> Selfcheck:
    """What its one line of JSON means, or the last line of what it complained of."""
    if exit_code != 0:
        last = errors.strip().splitlines()[-1:] or [f"exit code {exit_code} without a word"]
        return Selfcheck(crash=last[0])
    return Selfcheck(json.loads(output))
