"""Runs training.preflight.selfcheck in a process of its own: do the libraries compute correctly on this device?"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.trainer.environment import child_environment


@dataclass(frozen=True)
class Selfcheck:
    """What the selfcheck found; `crash` is its last line if it gave no answer."""

    found: dict[str, Any] = field(default_factory=dict)
    crash: str | None = None

    @property
    def fault(self) -> str | None:
        """Why this device cannot train, in one line; None when a 4-bit layer computed the expected result."""
        return self.crash or self.found["nf4_error"]


async def run_selfcheck(
    device: str, gpus: Sequence[str], seconds: float, *, kernels: bool = False, work_dir: Path | None = None
) -> Selfcheck:
    """Checks "cpu", or "cuda" with only these GPUs. Raises TimeoutError when there is no answer in time.

    With `kernels` those of linear attention and of experts are proven too, and compiled into `work_dir`.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "training.preflight.selfcheck", device, *(["--kernels"] if kernels else [])),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(os.environ, gpus, work_dir),
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return read_selfcheck(process.returncode or 0, output.decode(), errors.decode(errors="replace"))


def read_selfcheck(exit_code: int, output: str, errors: str) -> Selfcheck:
    """Parses its one line of JSON, or takes the last line of its error output."""
    if exit_code != 0:
        last = errors.strip().splitlines()[-1:] or [f"exit code {exit_code} and no output"]
        return Selfcheck(crash=last[0])
    return Selfcheck(json.loads(output))
