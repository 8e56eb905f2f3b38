"""Environments with other libraries than ours, for tests that read our files with them: made once, and kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path


def other_environment(name: str, *requirements: str) -> Path:
    """Returns the Python of an environment with these packages, installed with pip on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brightrun-trainer" / "environments"
    cache.mkdir(parents=True, exist_ok=True)
    fingerprint = hashlib.sha256(" ".join((sys.version, *requirements)).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{fingerprint}"
    python, whole = folder / "bin" / "python", folder / "whole"
    with (cache / f"{name}.lock").open("w") as lock:
        # Two workers must not install at once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
            whole.touch()
    return python
