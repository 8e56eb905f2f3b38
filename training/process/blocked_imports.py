"""Packages that a trainer must not find, because libraries import them wherever they are installed, needed or not.

trl imports wandb, which takes a second and makes folders; a job that brought no key has no use for it. accelerate
imports boto3, for SageMaker's machines; the daemon's library for RunPod brings it. Standard library only: called before
the libraries are imported.
"""

from __future__ import annotations

import os
import sys


def hide_unwanted_packages() -> None:
    """Let `import boto3` fail, and `import wandb` in a process without W&B's key; find_spec finds neither."""
    sys.modules["boto3"] = None  # type: ignore[assignment]
    if "WANDB_API_KEY" not in os.environ:
        sys.modules["wandb"] = None  # type: ignore[assignment]
