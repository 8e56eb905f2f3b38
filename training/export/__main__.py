"""Runs one export: `python -m training.export`, with the request as JSON on stdin.

Writes JSON lines to stdout: `progress` (done_bytes, total_bytes), at last `done` (result) or `failed` (code, message,
hint). What libraries print goes to stderr. Exit status 0, or 1 after `failed`.
"""

from __future__ import annotations

import json
import sys
import time

from training.export.orders import export_of
from training.failures import TrainingFailed, diagnose
from training.json_lines import Say, own_stdout
from training.parent_process import die_with_parent

# Often enough for a bar, seldom enough to cost nothing.
_PROGRESS_SECONDS = 0.2


def main() -> int:
    say = own_stdout()
    die_with_parent()
    request = json.loads(sys.stdin.read())
    try:
        result = export_of(str(request["kind"]))(request, _Progress(say))
    except TrainingFailed as failed:
        say({"kind": "failed", "code": failed.code, "message": failed.message, "hint": failed.hint})
        return 1
    except Exception as error:
        found = diagnose(error, None)
        say({"kind": "failed", "code": found.code, "message": found.message, "hint": found.hint})
        # The stack goes to stderr, for the operator.
        raise
    say({"kind": "done", "result": result})
    return 0


class _Progress:
    """Says how many bytes are done, a few times a second."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._said_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._said_at >= _PROGRESS_SECONDS:
            self._said_at = now
            self._say({"kind": "progress", "done_bytes": done, "total_bytes": total})


if __name__ == "__main__":
    sys.exit(main())
