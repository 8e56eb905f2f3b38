"""Stands in for `python -m training.export`: writes files at once, or does what `export.json` in the base's folder
says.

{"wait_for": PATH}   goes on once the file is there, and leaves its pid in PATH.pid meanwhile
{"seconds": 0.5}     takes that long
{"failed": {…}}      ends with these words: code, message, hint
{"dies": true}       ends without a word
{"files": {…}}       texts by file names, instead of the usual ones
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from training.death_signal import end_with_parent

FILES = {"config.json": "{}", "model.safetensors": "merged" * 1000, "merges.txt": "a b"}


def main() -> int:
    end_with_parent()
    request = json.loads(sys.stdin.read())
    script = _script(Path(request["base"])) if "base" in request else {}
    if (awaited := script.get("wait_for")) is not None:
        Path(f"{awaited}.pid").write_text(str(os.getpid()))
        while not Path(awaited).exists():
            time.sleep(0.02)
    time.sleep(script.get("seconds", 0.0))
    if (failed := script.get("failed")) is not None:
        print(json.dumps({"kind": "failed", **failed}), flush=True)
        return 1
    if script.get("dies"):
        return 3
    into = Path(request["into"])
    into.mkdir()
    for name, text in script.get("files", FILES).items():
        (into / name).write_text(f"{request['kind']} {text}")
    result = {"path": str(into), "base_model": request.get("base_model"), "is_dequantised": False}
    print(json.dumps({"kind": "done", "result": result}), flush=True)
    return 0


def _script(base: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((base / "export.json").read_text()))
    except FileNotFoundError:
        return {}


if __name__ == "__main__":
    sys.exit(main())
