"""llama.cpp itself, in a process of its own: what it answers for a GGUF file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.other_libraries import library, python_path
from tests.training.export import llama_cpp_reader

# llama.cpp's server as a wheel.
_WHEEL = "xllamacpp==2026.10.11549"


def ask_llama_cpp(model: Path, **request: Any) -> dict[str, Any]:
    """What llama.cpp says of this file, as llama_cpp_reader.py tells it."""
    asked = {"model": str(model), "lora": None, "prompts": [], "texts": [], "chats": [], "words": 1, **request}
    done = subprocess.run(
        [sys.executable, llama_cpp_reader.__file__],
        input=json.dumps(asked),
        env=python_path(library(_WHEEL)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
