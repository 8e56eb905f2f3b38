"""Packages that a trainer must not find: trl imports wandb wherever it is installed, whoever asked for it or not.

Its import takes a second and makes folders; a job that brought no key has no use for it. Standard library only: called
before the libraries are imported.
"""

from __future__ import annotations

import os
import sys


def hide_unwanted_packages() -> None:
    """Let `import wandb` fail, and find_spec find nothing, in a process without W&B's key."""
    if "WANDB_API_KEY" not in os.environ:
        sys.modules["wandb"] = None  # type: ignore[assignment]
