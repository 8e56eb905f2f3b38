"""The environment of a trainer process that a command starts: the daemon's allow list, and all GPUs of this host."""

from __future__ import annotations

import os

from daemon.host.gpus import find_gpus
from daemon.trainer.environment import child_environment


def trainer_environment() -> dict[str, str]:
    """Our environment without secrets, and offline: everything that the trainer opens is on this disk."""
    return child_environment(os.environ, [gpu.cuda_name for gpu in find_gpus()]) | {"TRANSFORMERS_VERBOSITY": "error"}
