"""Runs `python -m training.comparison`: a request on its stdin, its JSON lines back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from daemon.cli.data.trainer_process import trainer_environment
from daemon.cli.errors import CommandFailed

_STDERR_TAIL_BYTES = 4000


def ask_process(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what the process says until it is done. Raises CommandFailed in its words, or if it was killed."""
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "training.comparison"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=trainer_environment(),
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.close()
            for line in process.stdout:
                said: dict[str, Any] = json.loads(line)
                if said["kind"] == "failed":
                    raise CommandFailed(said["message"], said.get("hint"))
                if said["kind"] == "done":
                    return
                yield said
        except BrokenPipeError:
            pass
        finally:
            # It has nothing to save.
            process.kill()
        status = process.wait()
        stderr.seek(0)
        tail = stderr.read()[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        raise CommandFailed(f"the models' process {how}" + (f": {tail[-1]}" if tail else ""))
