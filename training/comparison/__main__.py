"""The process: a request on stdin, JSON lines on stdout, ending with `done` or `failed`."""

from __future__ import annotations

import sys

from pydantic import ValidationError

from training.comparison.request import Request
from training.events import ErrorCode
from training.failures import TrainingFailed, diagnose
from training.json_lines import own_stdout
from training.parent_process import die_with_parent
from training.quick_imports import quick_imports
from training.spec import faults_of


def main() -> int:
    die_with_parent()
    say = own_stdout()
    try:
        request = Request.model_validate_json(sys.stdin.readline())
        with quick_imports():
            from training.comparison.contest import Contest
        Contest(request, say).run()
    except ValidationError as error:
        say({"kind": "failed", "message": "; ".join(f"{fault.field}: {fault.message}" for fault in faults_of(error))})
        return 1
    except TrainingFailed as failed:
        say({"kind": "failed", "code": failed.code, "message": failed.message, "hint": failed.hint})
        return 1
    except Exception as error:
        found = diagnose(error, None)
        say({"kind": "failed", "code": found.code, "message": found.message, "hint": _hint(found.code)})
        raise
    return 0


def _hint(code: ErrorCode) -> str:
    """What a job could change is not what a comparison can."""
    if code is ErrorCode.OUT_OF_MEMORY:
        return "ask for shorter answers (--max-tokens), or compare on a GPU with more memory"
    return "try again; if it fails the same way, report it"


if __name__ == "__main__":
    sys.exit(main())
