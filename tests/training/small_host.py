"""A rank of a host that is too small for the model: `torchrun tests/training/small_host.py BYTES DESK EVENTS`."""

from __future__ import annotations

import os
import sys

import training.shards
from training import rank

_memory_bytes = int(sys.argv[1])
training.shards.device_memory_bytes = lambda _device: _memory_bytes  # type: ignore[attr-defined]
sys.argv[1:] = ["--launcher", str(os.getppid()), "--desk", sys.argv[2], "--events", sys.argv[3]]
sys.exit(rank.main())
