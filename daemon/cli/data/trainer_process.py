"""What a process of the trainer's gets of our environment: no secret, and no way to the hub."""

from __future__ import annotations

import os

# Ours to know, not the trainer's.
_SECRET = ("DATABASE_URL", "SUPABASE_", "TRAINER_", "RUNPOD_", "HF_TOKEN", "PG")


def trainer_environment() -> dict[str, str]:
    """Ours without its secrets, and offline: everything that it opens is on this disk."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET)}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
