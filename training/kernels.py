"""Checks whether the installed linear-attention kernels can be used on this GPU.

flash-linear-attention refuses a gated model's backward on Hopper with Triton from 3.4.0 to before 3.7.1, because the
results would be wrong (fla-core 0.6.0, ops/common/chunk_o.py). It refuses only in the first step, after the model has
been loaded and paid for. Standard library and NVML only: libraries choose their kernels at import, so we check before.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

_HOPPER = 9
_WRONG_FROM, _WRONG_BEFORE = Version("3.4.0"), Version("3.7.1")

Capability = tuple[int, int]


def fault_of_kernels(capability: Capability | None) -> str | None:
    """Explains why flash-linear-attention must not be used with this compute capability. None if it may, or is absent.

    With tilelang installed it uses other kernels than Triton's.
    """
    fla, triton = _version("fla-core"), _version("triton")
    if capability is None or capability[0] != _HOPPER or fla is None or triton is None or find_spec("tilelang"):
        return None
    # 3.5.1+git… counts as 3.5.1, and 3.7.1rc1 comes before 3.7.1.
    if not _WRONG_FROM <= Version(Version(triton).public) < _WRONG_BEFORE:
        return None
    return (
        f"flash-linear-attention {fla} cannot be used with Triton {triton} on this GPU (compute capability "
        f"{capability[0]}.{capability[1]}): its backward would be wrong. Take a torch that brings Triton "
        f"{_WRONG_BEFORE} or newer, 2.13.0 say"
    )


def hide_wrong_kernels() -> None:
    """Makes `import fla` fail where its kernels must not be used: transformers then computes in plain PyTorch."""
    if fault_of_kernels(capability_by_nvml()) is not None:
        sys.modules["fla"] = None  # type: ignore[assignment]


def capability_by_nvml() -> Capability | None:
    """Reads the compute capability of this process's first GPU without opening the CUDA driver; None without a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        card = (
            pynvml.nvmlDeviceGetHandleByIndex(int(shown))
            if shown.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(shown)
        )
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
    except (pynvml.NVMLError, ValueError):
        return None
    return int(major), int(minor)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
