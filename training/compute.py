"""Which type the products of a job are computed in, bfloat16 or float32: decided here, and a fact of the plan.

Standard library only, so that the plan and the estimate know it before torch is imported.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

# (float16, which older notes name, overflows on these models.)
ComputeType = Literal["bfloat16", "float32"]

# How the kernel names the units of an x86 CPU that multiply bfloat16.
_BF16_UNITS = {"avx512_bf16", "amx_tile"}


def compute_type(device: str, asked: ComputeType | None = None) -> ComputeType:
    """What was asked for; else bfloat16 where the hardware multiplies it, as every card does that we train on.

    A CPU without units for it takes sixty times as long as in float32.
    """
    if asked is not None:
        return asked
    return "bfloat16" if device == "cuda" or cpu_multiplies_bf16() else "float32"


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this host's CPU has units for bfloat16 that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not _BF16_UNITS.isdisjoint(flags)
