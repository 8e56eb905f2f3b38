"""Keeps CUDA unopened in the fork server, and checks whether it opens in a fork."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.spec import JobSpec


def capability_by_nvml() -> tuple[int, int] | None:
    """Reads the compute capability of this process's first GPU without opening the CUDA driver; None without a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if shown.isdecimal():
            card = pynvml.nvmlDeviceGetHandleByIndex(int(shown))
        else:
            card = pynvml.nvmlDeviceGetHandleByUUID(shown)
            if pynvml.nvmlDeviceIsMigDeviceHandle(card):
                card = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(card)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
    except pynvml.NVMLError:
        return None
    return int(major), int(minor)


@contextmanager
def _card_unopened() -> Iterator[None]:
    """When imported, bitsandbytes asks for each GPU's compute capability, and torch would open the driver to answer.
    Inside this context NVML answers instead. If it cannot, torch is asked after all, and forks start a new process."""
    import torch

    cuda: Any = torch.cuda
    original = cuda.get_device_capability
    cuda.get_device_capability = lambda device=None: capability_by_nvml() or original(device)
    try:
        yield
    finally:
        cuda.get_device_capability = original


def _card_opens(spec: JobSpec) -> bool:
    """Returns False if a library has opened the driver before the fork after all."""
    if spec.device != "cuda":
        return True
    import torch

    try:
        torch.cuda.init()
        torch.cuda.mem_get_info()
    except RuntimeError:
        return False
    return True
