"""Other versions of the libraries than ours, for tests that read our files with them: installed once, and kept.

Each stands in a folder of its own, which goes before the running environment's packages. So nothing large (torch) is
installed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
# What pip says where no index can be reached.
_NO_NETWORK = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "ProxyError", "ReadTimeoutError")


def library(*requirements: str) -> Path:
    """Returns a folder with exactly these packages, without what they depend on. Skips where pip has no network."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brightrun-trainer" / "libraries"
    cache.mkdir(parents=True, exist_ok=True)
    fingerprint = hashlib.sha256(" ".join((sys.version, *requirements)).encode()).hexdigest()[:12]
    folder = cache / f"{requirements[0].replace('==', '-')}-{fingerprint}"
    whole = folder / "whole"
    with (cache / f"{folder.name}.lock").open("w") as lock:
        # Two workers must not install at once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.is_file():
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", folder]
            done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
            if done.returncode and any(word in done.stderr for word in _NO_NETWORK):
                pytest.skip(f"pip cannot reach a package index to install {', '.join(requirements)}")
            assert done.returncode == 0, done.stderr[-4000:]
            whole.touch()
    return folder


def python_path(*libraries: Path) -> dict[str, str]:
    """Returns the variables of a process that takes its packages from these folders first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, libraries)), "PYTHONDONTWRITEBYTECODE": "1"}
