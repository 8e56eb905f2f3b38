"""Packages from npm for the tests, pinned, each set in a folder of its own under .cache that git ignores."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.paths import ROOT

CACHE = ROOT / ".cache" / "npm"


class NpmMissing(RuntimeError):
    """There is no npm on this machine, or it could not install."""


def installed(packages: Mapping[str, str], *, optional: bool) -> Path:
    """The node_modules folder with exactly these versions, installed on first use. No script of a package is run."""
    if shutil.which("npm") is None:
        raise NpmMissing("npm is not installed: install Node.js 20 or later (Debian: apt-get install npm)")
    wanted = json.dumps({"private": True, "dependencies": dict(sorted(packages.items()))}, indent=2)
    folder = CACHE / hashlib.sha256(f"{wanted}{optional}".encode()).hexdigest()[:12]
    done = folder / "installed"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text(wanted)
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        if not optional:
            # Next's compilers, a hundred megabytes for each platform, are no help to a type check.
            command.append("--omit=optional")
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        if run.returncode != 0:
            raise NpmMissing(f"npm install failed in {folder}: {run.stderr[-2000:]}")
        done.touch()
    return folder / "node_modules"
