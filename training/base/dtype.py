"""The type that this device computes in, and its memory."""

from __future__ import annotations

import os

import torch

from training.compute import ComputeType, compute_type


def compute_dtype(device: str, asked: ComputeType | None = None) -> torch.dtype:
    """Converts the type of `training.compute` to torch's."""
    return torch.bfloat16 if compute_type(device, asked) == "bfloat16" else torch.float32


def device_memory_bytes(device: str) -> int:
    """Returns the total memory of the GPU, or of the host."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
