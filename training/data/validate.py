"""Validates a dataset in the background at low priority, before its job is claimed.

    python -m training.data.validate dataset.jsonl

Prints one JSON line: `conversations`, or the `code` and `message` that its job would fail with. Nothing is decided by
it, since the job reads its data itself; it only puts a warning into the operator's log.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from training.data.formats.read_dataset import read_conversations
from training.failures import TrainingFailed
from training.parent_process import die_with_parent


def main() -> None:
    die_with_parent()
    _step_back()
    try:
        said: dict[str, object] = {"conversations": len(read_conversations(Path(sys.argv[1])).conversations)}
    except TrainingFailed as error:
        said = {"code": error.code, "message": error.message}
    sys.stdout.write(json.dumps(said) + "\n")


def _step_back() -> None:
    """Gives running training precedence, for the processor and when memory runs out."""
    os.nice(19)
    Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
