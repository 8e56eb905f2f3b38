"""Hides packages that libraries would import wherever they are installed, needed or not.

trl imports wandb, which takes a second and creates folders; a job without a W&B key does not need it. accelerate
imports boto3, for SageMaker; RunPod's library, which the daemon uses, installs it. Standard library only: called
before the libraries are imported.
"""

from __future__ import annotations

import os
import sys


def hide_unwanted_packages() -> None:
    """Makes `import boto3` fail, and `import wandb` in a process without W&B's key; find_spec finds neither."""
    sys.modules["boto3"] = None  # type: ignore[assignment]
    if "WANDB_API_KEY" not in os.environ:
        sys.modules["wandb"] = None  # type: ignore[assignment]
