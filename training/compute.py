"""Decides whether a job computes in bfloat16 or float32. The choice is part of the plan.

Standard library only, so that the plan and the estimate can use it before torch is imported.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

# (float16, which older notes name, overflows on these models.)
ComputeType = Literal["bfloat16", "float32"]

# CPU flags in the kernel's /proc/cpuinfo that mean bfloat16 matrix units on x86.
_BF16_UNITS = {"avx512_bf16", "amx_tile"}


def compute_type(device: str, asked: ComputeType | None = None) -> ComputeType:
    """Returns the requested type; by default bfloat16 where the hardware multiplies it, as all our GPUs do.

    On a CPU without bfloat16 units, bfloat16 takes sixty times as long as float32.
    """
    if asked is not None:
        return asked
    return "bfloat16" if device == "cuda" or cpu_multiplies_bf16() else "float32"


@cache
def cpu_multiplies_bf16() -> bool:
    """Returns True if this CPU has bfloat16 units that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not _BF16_UNITS.isdisjoint(flags)
