"""Whether CUDA is untouched in the fork server, and whether it opens in a fork."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.kernels import capability_by_nvml
from training.spec import JobSpec


@contextmanager
def _card_unopened() -> Iterator[None]:
    """bitsandbytes asks each card for its compute capability when it is imported, and torch opens the driver for it;
    NVML knows the answer as well. Where it does not, torch is asked after all, and forks start afresh."""
    import torch

    cuda: Any = torch.cuda
    original = cuda.get_device_capability
    cuda.get_device_capability = lambda device=None: capability_by_nvml() or original(device)
    try:
        yield
    finally:
        cuda.get_device_capability = original


def _card_opens(spec: JobSpec) -> bool:
    """False where a library has opened the driver before the fork, after all."""
    if spec.device != "cuda":
        return True
    import torch

    try:
        torch.cuda.init()
        torch.cuda.mem_get_info()
    except RuntimeError:
        return False
    return True
