"""Commands of ours on many DATABASE_URLs: `python -m tests.database.every_url`, on stdin the commands' words and the
addresses as JSON, two lists.

Each command on each address is a process of its own, forked after the imports, with its own output and exit status;
both come back as JSON, in a list for each command.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_one(words: list[str], url: str, output: Path) -> int:
    """Fork, run the command with this address, return its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ["DATABASE_URL"] = url
        sys.argv = ["brightrun-trainer", *words]
        from daemon.__main__ import main

        try:
            main()
            status = 0
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else 1
        except BaseException:  # noqa: BLE001 as the interpreter would end
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    # What all of them import and build, once.
    import tests.doubles.command_line  # noqa: F401

    commands, urls = json.load(sys.stdin)
    answers: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for words in commands:
            said = []
            for url in urls:
                output = Path(folder) / f"{len(answers)}-{len(said)}"
                status = run_one(words, url, output)
                said.append({"status": status, "output": output.read_text(errors="replace")})
            answers.append(said)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
