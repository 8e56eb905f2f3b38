"""The environment of a trainer process: without secrets, and without access to the hub."""

from __future__ import annotations

import os

# Variables that the trainer must not see.
_SECRET = ("DATABASE_URL", "SUPABASE_", "TRAINER_", "RUNPOD_", "HF_TOKEN", "PG")


def trainer_environment() -> dict[str, str]:
    """Our environment without secrets, and offline: everything that the trainer opens is on this disk."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET)}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
