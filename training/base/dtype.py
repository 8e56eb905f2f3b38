"""The type that this device computes in, and its memory."""

from __future__ import annotations

import time

import torch

from training.compute import ComputeType, compute_type
from training.files.free_memory import Memory, total_bytes

# The driver takes a few seconds to give back the memory of a process that was killed.
_RELEASE_SECONDS = 15.0


def compute_dtype(device: str, asked: ComputeType | None = None) -> torch.dtype:
    """Converts the type of `training.compute` to torch's."""
    return torch.bfloat16 if compute_type(device, asked) == "bfloat16" else torch.float32


def device_memory(device: str, wanted_bytes: int = 0) -> Memory:
    """Returns the memory of the GPU, or of the host, all of which counts as free: what waits in it makes room.

    A GPU that could have `wanted_bytes` free and has not is asked again for some seconds.
    """
    if device != "cuda":
        return Memory.all_free(total_bytes())
    give_up_at = time.monotonic() + _RELEASE_SECONDS
    while True:
        free, total = torch.cuda.mem_get_info()
        # What this process has reserved is free for its own use.
        memory = Memory(int(total), int(free) + torch.cuda.memory_reserved())
        if not memory.free_bytes < wanted_bytes <= memory.total_bytes or time.monotonic() > give_up_at:
            return memory
        time.sleep(0.5)
